// The entries `_C.act_inverse` and `_C.act_displacement`.
#include "core/act_inverse.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "bindings/call.h"
#include "bindings/entries.h"

namespace tpext::bindings {

namespace {

void run(const char* op, const Argument& target, const Argument& input, const std::string& activation, double reg,
         const Argument& output, const py::object& execution, bool displacement) {
  KernelCall call(op, target, execution);
  call.floats(target, "N");
  call.floats(input, "N");
  call.written(output, "N");
  const double scale = 1 + choose(op, "activation", activation, {"tanh", "sigmoid"});
  if (!(reg > 0) || std::isinf(reg)) call.refuse("reg must be a finite number > 0, got " + std::to_string(reg));
  if (call.on_cuda()) throw py::value_error(target.label() + " must be on the CPU, got a CUDA device");
  call.run([&]<class T>(T) {
    // 16 reg must not overflow; what so great a reg does to the result is the same.
    const double g = scale == 2 ? 16 * std::min(reg, 1e300) : reg, most = std::max(1.0, g);
    return ActInverse<T>{call.size('N'),
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
  });
}

void act_inverse(const char* op, const Argument& target, const Argument& input, const std::string& activation,
                 double reg, const Argument& output, const py::object& execution) {
  run(op, target, input, activation, reg, output, execution, false);
}

void act_displacement(const char* op, const Argument& displacement, const Argument& input,
                      const std::string& activation, double reg, const Argument& output, const py::object& execution) {
  run(op, displacement, input, activation, reg, output, execution, true);
}

}  // namespace

void define_act_inverse(py::module_& m) {
  define(m, "act_inverse", act_inverse, {"target", "input", "activation", "reg", "output", "execution"});
  define(m, "act_displacement", act_displacement,
         {"displacement", "input", "activation", "reg", "output", "execution"});
}

}  // namespace tpext::bindings
