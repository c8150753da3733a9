// The entries `_C.act_inverse` and `_C.act_displacement`.
#include "core/act_inverse.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/entries.h"
#include "bindings/execution.h"
#include "cpu/kernels.h"

namespace tpext::bindings {

namespace {

void run(const char* op, const char* name, const py::object& target_, const py::object& input_,
         const std::string& activation, double reg, const py::object& output_, const py::object& execution_,
         bool displacement) {
  const Argument target(op, name, target_), input(op, "input", input_), output(op, "output", output_);
  const Execution execution(op, target, execution_);
  target.require_rank({"N"});
  const Dim N{"N", target.size(0)};
  const bool is_double = target.dtype() == dlpack::kFloat64;
  const dlpack::DataType dtype = is_double ? dlpack::kFloat64 : dlpack::kFloat32;
  target.require_dense(dtype, target);
  input.require_shape({N});
  input.require_dense(dtype, target);
  output.require_shape({N});
  output.require_dense(dtype, target);
  const double scale = 1 + choose(op, "activation", activation, {"tanh", "sigmoid"});
  if (!(reg > 0) || std::isinf(reg))
    throw py::value_error(std::string(op) + ": reg must be a finite number > 0, got " + std::to_string(reg));
  if (execution.on_cuda())
    throw py::value_error(std::string(op) + ": " + name + " must be on the CPU, got a CUDA device");
  const auto call = [&]<class T>(T) {
    // 16 reg must not overflow; what so great a reg does to the result is the same.
    const double g = scale == 2 ? 16 * std::min(reg, 1e300) : reg, most = std::max(1.0, g);
    const ActInverse<T> args{N.size,
                             static_cast<T>(scale),
                             static_cast<T>(1 / most),
                             std::max(static_cast<T>(g / most), std::numeric_limits<T>::min()),
                             static_cast<T>(1 / std::max(g, std::sqrt(g))),
                             static_cast<T>(0.75 * std::min(std::sqrt(g), 1e30)),
                             static_cast<T>(std::log(4 / g) / 2),
                             target.data<const T>(),
                             input.data<const T>(),
                             output.data<T>(),
                             displacement};
    const py::gil_scoped_release release;
    cpu::kernels()(args, execution.threads());
  };
  is_double ? call(double()) : call(float());
}

void act_inverse(const py::object& target, const py::object& input, const std::string& activation, double reg,
                 const py::object& output, const py::object& execution) {
  run("act_inverse", "target", target, input, activation, reg, output, execution, false);
}

void act_displacement(const py::object& displacement, const py::object& input, const std::string& activation,
                      double reg, const py::object& output, const py::object& execution) {
  run("act_displacement", "displacement", displacement, input, activation, reg, output, execution, true);
}

}  // namespace

void define_act_inverse(py::module_& m) {
  m.def("act_inverse", &act_inverse, py::arg("target"), py::arg("input"), py::arg("activation"), py::arg("reg"),
        py::arg("output"), py::arg("execution"));
  m.def("act_displacement", &act_displacement, py::arg("displacement"), py::arg("input"), py::arg("activation"),
        py::arg("reg"), py::arg("output"), py::arg("execution"));
}

}  // namespace tpext::bindings
