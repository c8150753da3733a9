// The entries `_C.regularized_inverse` and `_C.regularized_solve`.
#include "core/regularized_inverse.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "bindings/arguments.h"
#include "bindings/entries.h"
#include "bindings/execution.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

namespace {

// Returns the number of matrices whose status is not ok, so that a caller need not read them; 0 on CUDA.
int64_t regularized_inverse(const py::object& weight_, double reg, const py::object& inverse_,
                            const py::object& status_, const py::object& execution_) {
  constexpr const char* op = "regularized_inverse";
  const Argument weight(op, "weight", weight_), inverse(op, "inverse", inverse_), status(op, "status", status_);
  const Execution execution(op, weight, execution_);
  weight.require_rank({"batch", "M", "N"});
  const Dim batch{"batch", weight.size(0)}, M{"M", weight.size(1)}, N{"N", weight.size(2)};
  const bool is_double = weight.dtype() == dlpack::kFloat64;
  const dlpack::DataType dtype = is_double ? dlpack::kFloat64 : dlpack::kFloat32;
  weight.require_dense(dtype, weight);
  inverse.require_shape({batch, N, M});
  inverse.require_dense(dtype, weight);
  status.require_shape({batch});
  status.require_dense(dlpack::kInt64, weight);
  if (!(reg >= 0)) throw py::value_error(std::string(op) + ": reg must be >= 0, got " + std::to_string(reg));
  if (execution.on_cuda() && std::max(M.size, N.size) > cuda::kLargestInverse)
    throw py::value_error(weight.label() + " must have M and N of at most " + std::to_string(cuda::kLargestInverse) +
                          " on CUDA, got " + weight.shape_text());
  const auto run = [&]<class T>(T) {
    const RegularizedInverse<T> args{batch.size,
                                     M.size,
                                     N.size,
                                     static_cast<T>(reg),
                                     weight.data<const T>(),
                                     inverse.data<T>(),
                                     status.data<int64_t>()};
    const py::gil_scoped_release release;
    if constexpr (kWithCuda) {
      if (execution.on_cuda()) return cuda::regularized_inverse(args, execution.queue());
    }
    inverse.prefer_huge_pages();
    cpu::kernels()(args, execution.threads());
  };
  is_double ? run(double()) : run(float());
  if (execution.on_cuda()) return 0;
  const auto* const statuses = status.data<const int64_t>();
  return batch.size - std::count(statuses, statuses + batch.size, 0);
}

// On the CPU only. Returns the number of matrices whose status is not ok.
int64_t regularized_solve(const py::object& weight_, const py::object& rhs_, double reg, const py::object& solution_,
                          const py::object& status_, const py::object& execution_) {
  constexpr const char* op = "regularized_solve";
  const Argument weight(op, "weight", weight_), rhs(op, "rhs", rhs_), solution(op, "solution", solution_),
      status(op, "status", status_);
  const Execution execution(op, weight, execution_);
  if (execution.on_cuda())
    throw py::value_error(weight.label() + " must be on the CPU: on CUDA the solution comes from the inverse");
  weight.require_rank({"batch", "M", "N"});
  const Dim batch{"batch", weight.size(0)}, M{"M", weight.size(1)}, N{"N", weight.size(2)};
  constexpr int64_t order = RegularizedSolve<float>::kLargestOrder, terms = RegularizedSolve<float>::kMostTerms;
  if (std::min(M.size, N.size) > order || std::max(M.size, N.size) > terms)
    throw py::value_error(weight.label() + " must have min(M, N) of at most " + std::to_string(order) +
                          " and max(M, N) of at most " + std::to_string(terms) + ", got " + weight.shape_text());
  const bool is_double = weight.dtype() == dlpack::kFloat64;
  const dlpack::DataType dtype = is_double ? dlpack::kFloat64 : dlpack::kFloat32;
  weight.require_dense(dtype, weight);
  rhs.require_rank({"batch", "K", "M"});
  const Dim K{"K", rhs.size(1)};
  rhs.require_shape({batch, K, M});
  rhs.require_dense(dtype, weight);
  solution.require_shape({batch, K, N});
  solution.require_dense(dtype, weight);
  status.require_shape({batch});
  status.require_dense(dlpack::kInt64, weight);
  if (!(reg >= 0)) throw py::value_error(std::string(op) + ": reg must be >= 0, got " + std::to_string(reg));
  const auto run = [&]<class T>(T) {
    const RegularizedSolve<T> args{.batch = batch.size,
                                   .rows = M.size,
                                   .columns = N.size,
                                   .count = K.size,
                                   .reg = static_cast<T>(reg),
                                   .weight = weight.data<const T>(),
                                   .rhs = rhs.data<const T>(),
                                   .solution = solution.data<T>(),
                                   .status = status.data<int64_t>()};
    const py::gil_scoped_release release;
    cpu::kernels()(args, execution.threads());
  };
  is_double ? run(double()) : run(float());
  const auto* const statuses = status.data<const int64_t>();
  return batch.size - std::count(statuses, statuses + batch.size, 0);
}

}  // namespace

void define_regularized_inverse(py::module_& m) {
  m.def("regularized_inverse", &regularized_inverse, py::arg("weight"), py::arg("reg"), py::arg("inverse"),
        py::arg("status"), py::arg("execution"));
  m.def("regularized_solve", &regularized_solve, py::arg("weight"), py::arg("rhs"), py::arg("reg"), py::arg("solution"),
        py::arg("status"), py::arg("execution"));
}

}  // namespace tpext::bindings
