// The entry `_C.counter_normal`.
#include "core/counter_normal.h"

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/arguments.h"
#include "bindings/entries.h"
#include "bindings/execution.h"
#include "bindings/noise.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

namespace {

void counter_normal(const py::object& output_, int64_t seed, int64_t step, int64_t stream, int64_t first_row,
                    double scale, const py::object& execution_) {
  constexpr const char* op = "counter_normal";
  const Argument output(op, "output", output_);
  const Execution execution(op, output, execution_);
  output.require_rank({"B", "N"});
  const bool is_double = output.dtype() == dlpack::kFloat64;
  output.require_dense(is_double ? dlpack::kFloat64 : dlpack::kFloat32, output);
  const NoiseCounter counter = noise_counter(op, seed, step, stream, first_row, output.size(0), output.size(1));
  const auto run = [&]<class T>(T) {
    const CounterNormal<T> args{output.size(0), output.size(1), counter, static_cast<T>(scale), output.data<T>()};
    const py::gil_scoped_release release;
    if constexpr (kWithCuda) {
      if (execution.on_cuda()) return cuda::counter_normal(args, execution.queue());
    }
    output.prefer_huge_pages();
    cpu::kernels()(args, execution.threads());
  };
  is_double ? run(double()) : run(float());
}

}  // namespace

void define_counter_normal(py::module_& m) {
  m.def("counter_normal", &counter_normal, py::arg("output"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("first_row"), py::arg("scale"), py::arg("execution"));
}

}  // namespace tpext::bindings
