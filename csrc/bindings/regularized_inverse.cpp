// The entries `_C.regularized_inverse` and `_C.regularized_solve`.
#include "core/regularized_inverse.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings/call.h"
#include "bindings/entries.h"
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

void require_status(const Argument& status, const Dim& batch, const Argument& weight, bool needed) {
  if (!status.given() && !needed) return;
  status.require_shape({batch});
  status.require_dense(dlpack::kInt64, weight);
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

void require_ridge(const KernelCall& call, double reg) {
  if (!(reg >= 0)) call.refuse("reg must be >= 0, got " + std::to_string(reg));
  call.number("reg", reg);
}

void require_ridge(const KernelCall& call, const Numbers& reg, const Dim& batch) {
  call.numbers(reg, batch);
  for (const double value : reg.values()) require_ridge(call, value);
}

// Returns the number of matrices whose status is not ok, so that a caller need not read them; 0 on CUDA.
int64_t regularized_inverse(const char* op, const Argument& weight, const Numbers& reg, const Argument& inverse,
                            const Argument& status, const py::object& execution) {
  const KernelCall call(op, weight, execution);
  call.floats(weight);
  const Dim batch = require_matrices(weight), M{"M", size_from_last(weight, 2)}, N{"N", size_from_last(weight, 1)};
  call.written(inverse);
  require_matrices(inverse, batch, N, M);
  require_status(status, batch, weight, call.on_cuda());
  require_ridge(call, reg, batch);
  if (call.on_cuda() && std::max(M.size, N.size) > cuda::kLargestInverse)
    throw py::value_error(weight.label() + " must have M and N of at most " + std::to_string(cuda::kLargestInverse) +
                          " on CUDA, got " + weight.shape_text());
  const Statuses statuses(status, batch.size);
  call.run(
      [&]<class T>(T) {
        return RegularizedInverse<T>{batch.size,        M.size,         N.size, reg.as<T>(), weight.data<const T>(),
                                     inverse.data<T>(), statuses.data()};
      },
      [](const auto& args, const auto& queue) { cuda::regularized_inverse(args, queue); });
  return call.on_cuda() ? 0 : statuses.failures();
}

// On the CPU only. Returns the number of matrices whose status is not ok.
int64_t regularized_solve(const char* op, const Argument& weight, const Argument& rhs, double reg,
                          const Argument& solution, const Argument& status, const py::object& execution) {
  const KernelCall call(op, weight, execution);
  if (call.on_cuda())
    throw py::value_error(weight.label() + " must be on the CPU: on CUDA the solution comes from the inverse");
  call.floats(weight);
  const Dim batch = require_matrices(weight), M{"M", size_from_last(weight, 2)}, N{"N", size_from_last(weight, 1)};
  call.floats(rhs);
  const Dim K{"K", rhs.rank() < 2 ? 0 : size_from_last(rhs, 2)};
  require_matrices(rhs, batch, K, M);
  call.written(solution);
  require_matrices(solution, batch, K, N);
  require_status(status, batch, weight, false);
  require_ridge(call, reg);
  const Statuses statuses(status, batch.size);
  call.run([&]<class T>(T) {
    return RegularizedSolve<T>{.batch = batch.size,
                               .rows = M.size,
                               .columns = N.size,
                               .count = K.size,
                               .reg = static_cast<T>(reg),
                               .weight = weight.data<const T>(),
                               .rhs = rhs.data<const T>(),
                               .solution = solution.data<T>(),
                               .status = statuses.data()};
  });
  return statuses.failures();
}

}  // namespace

void define_regularized_inverse(py::module_& m) {
  define(m, "regularized_inverse", regularized_inverse, {"weight", "reg", "inverse", "status", "execution"});
  define(m, "regularized_solve", regularized_solve, {"weight", "rhs", "reg", "solution", "status", "execution"});
}

}  // namespace tpext::bindings
