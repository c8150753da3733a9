// The entries `_C.code_difference` and `_C.probe_difference`.
#include "core/pooled_difference.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/entries.h"
#include "bindings/execution.h"
#include "bindings/noise.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

namespace {

[[noreturn]] void refuse(const char* op, const std::string& what) {
  throw py::value_error(std::string(op) + ": " + what);
}

// kernel 0: no pool. Sizes are those of D's planes.
Pool make_pool(const char* op, int64_t kernel, int64_t stride, int64_t padding, int64_t height, int64_t width) {
  if (kernel == 0) return {0, 1, 0, height, width, height, width};
  if (kernel < 0) refuse(op, "kernel must be >= 0, got " + std::to_string(kernel));
  if (stride < 1) refuse(op, "stride must be >= 1, got " + std::to_string(stride));
  if (padding < 0 || padding > kernel / 2)
    refuse(op, "padding must lie in 0..kernel/2=" + std::to_string(kernel / 2) + ", got " + std::to_string(padding));
  if (height * width > std::numeric_limits<int32_t>::max())
    refuse(op, "a plane must have less than 2^31 elements, got " + std::to_string(height * width));
  const auto pooled = [&](const char* name, int64_t size) {
    if (size + 2 * padding < kernel)
      refuse(op, std::string(name) + " must be at least kernel - 2 padding = " + std::to_string(kernel - 2 * padding) +
                     ", got " + std::to_string(size));
    return (size + 2 * padding - kernel) / stride + 1;
  };
  const int64_t pooled_height = pooled("H", height), pooled_width = pooled("W", width);
  return {kernel, stride, padding, height, width, pooled_height, pooled_width};
}

Activation read_activation(const char* op, const std::string& name, double alpha) {
  const auto activation = static_cast<Activation>(choose(op, "activation", name, {"elu", "relu", "tanh", "identity"}));
  if (activation == Activation::elu && (!(alpha > 0) || std::isinf(alpha)))
    refuse(op, "alpha must be a finite number > 0, got " + std::to_string(alpha));
  return activation;
}

void code_difference(const py::object& preactivation_, const py::object& change_, const py::object& output_,
                     const py::object& indices_, const std::string& activation_, double alpha, int64_t kernel,
                     int64_t stride, int64_t padding, bool noisy, const py::object& difference_,
                     const py::object& execution_) {
  constexpr const char* op = "code_difference";
  const Argument preactivation(op, "preactivation", preactivation_), change(op, "change", change_),
      output(op, "output", output_), indices(op, "indices", indices_), difference(op, "difference", difference_);
  const Execution execution(op, preactivation, execution_);
  preactivation.require_rank({"P", "H", "W"});
  const Dim P{"P", preactivation.size(0)}, H{"H", preactivation.size(1)}, W{"W", preactivation.size(2)};
  const bool is_double = preactivation.dtype() == dlpack::kFloat64;
  const dlpack::DataType dtype = is_double ? dlpack::kFloat64 : dlpack::kFloat32;
  preactivation.require_dense(dtype, preactivation);
  change.require_rank({"K", "P", "H", "W"});
  const Dim K{"K", change.size(0)};
  change.require_shape({K, P, H, W});
  change.require_dense(dtype, preactivation);
  const Pool pool = make_pool(op, kernel, stride, padding, H.size, W.size);
  const Dim h{"h", pool.pooled_height}, w{"w", pool.pooled_width};
  output.require_shape({P, h, w});
  output.require_dense(dtype, preactivation);
  if (kernel > 0) {
    indices.require_shape({P, h, w});
    indices.require_dense(dlpack::kInt64, preactivation);
  }
  difference.require_shape({K, P, H, W});
  difference.require_dense(dtype, preactivation);
  const Activation activation = read_activation(op, activation_, alpha);
  const auto run = [&]<class T>(T) {
    const CodeDifference<T> args{.draws = K.size,
                                 .planes = P.size,
                                 .pool = pool,
                                 .activation = activation,
                                 .alpha = static_cast<T>(alpha),
                                 .noisy = noisy,
                                 .preactivation = preactivation.data<const T>(),
                                 .change = change.data<const T>(),
                                 .output = output.data<const T>(),
                                 .indices = indices.data<const int64_t>(),
                                 .difference = difference.data<T>()};
    const py::gil_scoped_release release;
    if constexpr (kWithCuda) {
      if (execution.on_cuda()) return cuda::code_difference(args, execution.queue());
    }
    difference.prefer_huge_pages();
    cpu::kernels()(args, execution.threads());
  };
  is_double ? run(double()) : run(float());
}

void probe_difference(const py::object& output_, const py::object& indices_, const std::string& activation_,
                      double alpha, int64_t kernel, int64_t stride, int64_t padding, double sigma, int64_t seed,
                      int64_t step, int64_t stream, int64_t stream_stride, int64_t first_row,
                      const py::object& difference_, const py::object& execution_) {
  constexpr const char* op = "probe_difference";
  const Argument output(op, "output", output_), indices(op, "indices", indices_),
      difference(op, "difference", difference_);
  const Execution execution(op, output, execution_);
  output.require_rank({"B", "C", "h", "w"});
  difference.require_rank({"K", "B", "C", "H", "W"});
  const Dim K{"K", difference.size(0)}, B{"B", output.size(0)}, C{"C", output.size(1)}, H{"H", difference.size(3)},
      W{"W", difference.size(4)};
  const bool is_double = output.dtype() == dlpack::kFloat64;
  const dlpack::DataType dtype = is_double ? dlpack::kFloat64 : dlpack::kFloat32;
  const Pool pool = make_pool(op, kernel, stride, padding, H.size, W.size);
  const Dim h{"h", pool.pooled_height}, w{"w", pool.pooled_width};
  output.require_shape({B, C, h, w});
  output.require_dense(dtype, output);
  if (kernel > 0) {
    indices.require_shape({B, C, h, w});
    indices.require_dense(dlpack::kInt64, output);
  }
  difference.require_shape({K, B, C, H, W});
  difference.require_dense(dtype, output);
  const Activation activation = read_activation(op, activation_, alpha);
  const NoiseCounter counter =
      noise_counter(op, seed, step, stream, first_row, B.size, C.size * pool.pooled_height * pool.pooled_width);
  require_range(op, "stream_stride", stream_stride, int64_t{1} << 32, "2^32");
  if (K.size > 0) require_range(op, "the last stream", stream + (K.size - 1) * stream_stride, int64_t{1} << 32, "2^32");
  const auto run = [&]<class T>(T) {
    const ProbeDifference<T> args{.draws = K.size,
                                  .rows = B.size,
                                  .channels = C.size,
                                  .pool = pool,
                                  .activation = activation,
                                  .alpha = static_cast<T>(alpha),
                                  .sigma = static_cast<T>(sigma),
                                  .counter = counter,
                                  .stream_stride = static_cast<uint32_t>(stream_stride),
                                  .output = output.data<const T>(),
                                  .indices = indices.data<const int64_t>(),
                                  .difference = difference.data<T>()};
    const py::gil_scoped_release release;
    if constexpr (kWithCuda) {
      if (execution.on_cuda()) return cuda::probe_difference(args, execution.queue());
    }
    difference.prefer_huge_pages();
    cpu::kernels()(args, execution.threads());
  };
  is_double ? run(double()) : run(float());
}

}  // namespace

void define_pooled_difference(py::module_& m) {
  m.def("code_difference", &code_difference, py::arg("preactivation"), py::arg("change"), py::arg("output"),
        py::arg("indices"), py::arg("activation"), py::arg("alpha"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("noisy"), py::arg("difference"), py::arg("execution"));
  m.def("probe_difference", &probe_difference, py::arg("output"), py::arg("indices"), py::arg("activation"),
        py::arg("alpha"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("sigma"), py::arg("seed"),
        py::arg("step"), py::arg("stream"), py::arg("stream_stride"), py::arg("first_row"), py::arg("difference"),
        py::arg("execution"));
}

}  // namespace tpext::bindings
