// The entry `_C.counter_normal`.
#include "core/counter_normal.h"

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/call.h"
#include "bindings/entries.h"
#include "bindings/noise.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

namespace {

void counter_normal(const char* op, const Argument& output, int64_t seed, int64_t step, int64_t stream,
                    int64_t first_row, double scale, const py::object& execution) {
  KernelCall call(op, output, execution);
  call.written(output, "BN");
  call.number("scale", scale);
  const int64_t rows = call.size('B'), columns = call.size('N');
  const NoiseCounter counter = noise_counter(op, seed, step, stream, first_row, rows, columns);
  call.run(
      [&]<class T>(T) { return CounterNormal<T>{rows, columns, counter, static_cast<T>(scale), output.data<T>()}; },
      [](const auto& args, const auto& queue) { cuda::counter_normal(args, queue); });
}

}  // namespace

void define_counter_normal(py::module_& m) {
  define(m, "counter_normal", counter_normal, {"output", "seed", "step", "stream", "first_row", "scale", "execution"});
}

}  // namespace tpext::bindings
