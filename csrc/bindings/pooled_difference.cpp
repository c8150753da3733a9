// The entries `_C.code_difference` and `_C.probe_difference`.
#include "core/pooled_difference.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <string>

#include "bindings/call.h"
#include "bindings/entries.h"
#include "bindings/noise.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

namespace {

// From the sizes H, W of D's planes, which gives h, w. kernel 0: no pool.
Pool make_pool(KernelCall& call, int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t height = call.size('H'), width = call.size('W');
  Pool pool{kernel, stride, padding, height, width, height, width};
  if (kernel == 0) {
    pool.stride = 1;
    pool.padding = 0;
  } else {
    if (kernel < 0) call.refuse("kernel must be >= 0, got " + std::to_string(kernel));
    if (stride < 1) call.refuse("stride must be >= 1, got " + std::to_string(stride));
    if (padding < 0 || padding > kernel / 2)
      call.refuse("padding must lie in 0..kernel/2=" + std::to_string(kernel / 2) + ", got " + std::to_string(padding));
    if (height * width > std::numeric_limits<int32_t>::max())
      call.refuse("a plane must have less than 2^31 elements, got " + std::to_string(height * width));
    const auto pooled = [&](const char* name, int64_t size) {
      const int64_t least = kernel - 2 * padding;
      if (size < least)
        call.refuse(std::string(name) + " must be at least kernel - 2 padding = " + std::to_string(least) + ", got " +
                    std::to_string(size));
      return (size - least) / stride + 1;
    };
    pool.pooled_height = pooled("H", height);
    pool.pooled_width = pooled("W", width);
  }
  call.set('h', pool.pooled_height);
  call.set('w', pool.pooled_width);
  return pool;
}

Activation read_activation(const KernelCall& call, const std::string& name, double alpha) {
  const auto activation =
      static_cast<Activation>(choose(call.op(), "activation", name, {"elu", "relu", "tanh", "identity"}));
  if (activation != Activation::elu) return activation;
  if (!(alpha > 0) || std::isinf(alpha)) call.refuse("alpha must be a finite number > 0, got " + std::to_string(alpha));
  call.number("alpha", alpha);
  return activation;
}

void code_difference(const char* op, const Argument& preactivation, const Argument& change, const Argument& output,
                     const Argument& indices, const std::string& activation, double alpha, int64_t kernel,
                     int64_t stride, int64_t padding, bool noisy, const Argument& difference,
                     const py::object& execution) {
  KernelCall call(op, preactivation, execution);
  call.floats(preactivation, "PHW");
  call.floats(change, "KPHW");
  const Pool pool = make_pool(call, kernel, stride, padding);
  call.floats(output, "Phw");
  if (kernel > 0) call.integers(indices, "Phw");
  call.written(difference, "KPHW");
  const Activation a = read_activation(call, activation, alpha);
  call.run(
      [&]<class T>(T) {
        return CodeDifference<T>{.draws = call.size('K'),
                                 .planes = call.size('P'),
                                 .pool = pool,
                                 .activation = a,
                                 .alpha = static_cast<T>(alpha),
                                 .noisy = noisy,
                                 .preactivation = preactivation.data<const T>(),
                                 .change = change.data<const T>(),
                                 .output = output.data<const T>(),
                                 .indices = indices.data<const int64_t>(),
                                 .difference = difference.data<T>()};
      },
      [](const auto& args, const auto& queue) { cuda::code_difference(args, queue); });
}

void probe_difference(const char* op, const Argument& output, const Argument& indices, const std::string& activation,
                      double alpha, int64_t kernel, int64_t stride, int64_t padding, double sigma, int64_t seed,
                      int64_t step, int64_t stream, int64_t stream_stride, int64_t first_row,
                      const Argument& difference, const py::object& execution) {
  KernelCall call(op, output, execution);
  output.require_rank({"B", "C", "h", "w"});
  call.set('B', output.size(0));
  call.set('C', output.size(1));
  call.written(difference, "KBCHW");
  const Pool pool = make_pool(call, kernel, stride, padding);
  call.floats(output, "BChw");
  if (kernel > 0) call.integers(indices, "BChw");
  const Activation a = read_activation(call, activation, alpha);
  call.number("sigma", sigma);
  const int64_t draws = call.size('K'), rows = call.size('B'), channels = call.size('C');
  const NoiseCounter counter =
      noise_counter(op, seed, step, stream, first_row, rows, channels * pool.pooled_height * pool.pooled_width);
  require_range(op, "stream_stride", stream_stride, int64_t{1} << 32, "2^32");
  require_range(op, "the number K of draws", draws, int64_t{1} << 31, "2^31");
  if (draws > 0) require_range(op, "the last stream", stream + (draws - 1) * stream_stride, int64_t{1} << 32, "2^32");
  call.run(
      [&]<class T>(T) {
        return ProbeDifference<T>{.draws = draws,
                                  .rows = rows,
                                  .channels = channels,
                                  .pool = pool,
                                  .activation = a,
                                  .alpha = static_cast<T>(alpha),
                                  .sigma = static_cast<T>(sigma),
                                  .counter = counter,
                                  .stream_stride = static_cast<uint32_t>(stream_stride),
                                  .output = output.data<const T>(),
                                  .indices = indices.data<const int64_t>(),
                                  .difference = difference.data<T>()};
      },
      [](const auto& args, const auto& queue) { cuda::probe_difference(args, queue); });
}

}  // namespace

void define_pooled_difference(py::module_& m) {
  define(m, "code_difference", code_difference,
         {"preactivation", "change", "output", "indices", "activation", "alpha", "kernel", "stride", "padding", "noisy",
          "difference", "execution"});
  define(m, "probe_difference", probe_difference,
         {"output", "indices", "activation", "alpha", "kernel", "stride", "padding", "sigma", "seed", "step", "stream",
          "stream_stride", "first_row", "difference", "execution"});
}

}  // namespace tpext::bindings
