// The entries `_C.regularized_inverse` and `_C.regularized_solve`.
#include "core/regularized_inverse.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/entries.h"
#include "bindings/execution.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

namespace {

// The size of an axis counted from the last, which is axis 1.
int64_t size_from_last(const Argument& argument, int64_t axis) { return argument.size(argument.rank() - axis); }

// The number of matrices [..., M, N], whatever their leading sizes.
int64_t count_matrices(const Argument& matrices) {
  int64_t count = 1;
  for (int64_t axis = 0; axis < matrices.rank() - 2; ++axis) count *= matrices.size(axis);
  return count;
}

Dim require_matrices(const Argument& argument) {
  argument.require();
  if (argument.rank() < 2)
    throw py::value_error(argument.label() + " must be [..., M, N], got " + argument.shape_text());
  return {"batch", count_matrices(argument)};
}

// So many matrices of these sizes.
void require_matrices(const Argument& argument, const Dim& batch, const Dim& rows, const Dim& columns) {
  argument.require();
  if (argument.rank() < 2 || count_matrices(argument) != batch.size || size_from_last(argument, 2) != rows.size ||
      size_from_last(argument, 1) != columns.size)
    argument.require_shape({batch, rows, columns});
}

// The status of each matrix where the caller wants none.
class Statuses {
 public:
  Statuses(const Argument& status, int64_t batch) : data_(status.data<int64_t>()), batch_(batch) {
    if (status.given()) return;
    own_.resize(static_cast<size_t>(batch));
    data_ = own_.data();
  }
  int64_t* data() const { return data_; }
  int64_t failures() const { return batch_ - std::count(data_, data_ + batch_, 0); }

 private:
  int64_t* data_;
  int64_t batch_;
  std::vector<int64_t> own_;
};

// Returns the number of matrices whose status is not ok, so that a caller need not read them; 0 on CUDA.
int64_t regularized_inverse(const py::object& weight_, double reg, const py::object& inverse_,
                            const py::object& status_, const py::object& execution_) {
  constexpr const char* op = "regularized_inverse";
  const Argument weight(op, "weight", weight_), inverse(op, "inverse", inverse_), status(op, "status", status_);
  const Execution execution(op, weight, execution_);
  const Dim batch = require_matrices(weight), M{"M", size_from_last(weight, 2)}, N{"N", size_from_last(weight, 1)};
  const bool is_double = weight.dtype() == dlpack::kFloat64;
  const dlpack::DataType dtype = is_double ? dlpack::kFloat64 : dlpack::kFloat32;
  weight.require_dense(dtype, weight);
  require_matrices(inverse, batch, N, M);
  inverse.require_dense(dtype, weight);
  if (status.given() || execution.on_cuda()) {
    status.require_shape({batch});
    status.require_dense(dlpack::kInt64, weight);
  }
  if (!(reg >= 0)) throw py::value_error(std::string(op) + ": reg must be >= 0, got " + std::to_string(reg));
  if (execution.on_cuda() && std::max(M.size, N.size) > cuda::kLargestInverse)
    throw py::value_error(weight.label() + " must have M and N of at most " + std::to_string(cuda::kLargestInverse) +
                          " on CUDA, got " + weight.shape_text());
  const Statuses statuses(status, batch.size);
  const auto run = [&]<class T>(T) {
    const RegularizedInverse<T> args{
        batch.size, M.size, N.size, static_cast<T>(reg), weight.data<const T>(), inverse.data<T>(), statuses.data()};
    const py::gil_scoped_release release;
    if constexpr (kWithCuda) {
      if (execution.on_cuda()) return cuda::regularized_inverse(args, execution.queue());
    }
    inverse.prefer_huge_pages();
    cpu::kernels()(args, execution.threads());
  };
  is_double ? run(double()) : run(float());
  if (execution.on_cuda()) return 0;
  return statuses.failures();
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
  const Dim batch = require_matrices(weight), M{"M", size_from_last(weight, 2)}, N{"N", size_from_last(weight, 1)};
  const bool is_double = weight.dtype() == dlpack::kFloat64;
  const dlpack::DataType dtype = is_double ? dlpack::kFloat64 : dlpack::kFloat32;
  weight.require_dense(dtype, weight);
  rhs.require();
  const Dim K{"K", rhs.rank() < 2 ? 0 : size_from_last(rhs, 2)};
  require_matrices(rhs, batch, K, M);
  rhs.require_dense(dtype, weight);
  require_matrices(solution, batch, K, N);
  solution.require_dense(dtype, weight);
  if (status.given()) {
    status.require_shape({batch});
    status.require_dense(dlpack::kInt64, weight);
  }
  if (!(reg >= 0)) throw py::value_error(std::string(op) + ": reg must be >= 0, got " + std::to_string(reg));
  const Statuses statuses(status, batch.size);
  const auto run = [&]<class T>(T) {
    const RegularizedSolve<T> args{.batch = batch.size,
                                   .rows = M.size,
                                   .columns = N.size,
                                   .count = K.size,
                                   .reg = static_cast<T>(reg),
                                   .weight = weight.data<const T>(),
                                   .rhs = rhs.data<const T>(),
                                   .solution = solution.data<T>(),
                                   .status = statuses.data()};
    const py::gil_scoped_release release;
    cpu::kernels()(args, execution.threads());
  };
  is_double ? run(double()) : run(float());
  return statuses.failures();
}

}  // namespace

void define_regularized_inverse(py::module_& m) {
  m.def("regularized_inverse", &regularized_inverse, py::arg("weight"), py::arg("reg"), py::arg("inverse"),
        py::arg("status"), py::arg("execution"));
  m.def("regularized_solve", &regularized_solve, py::arg("weight"), py::arg("rhs"), py::arg("reg"), py::arg("solution"),
        py::arg("status"), py::arg("execution"));
}

}  // namespace tpext::bindings
