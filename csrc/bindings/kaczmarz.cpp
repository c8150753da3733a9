// The entries `_C.kaczmarz_step` and `_C.kaczmarz_train`.
#include "core/kaczmarz.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <deque>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/call.h"
#include "bindings/entries.h"

namespace tpext::bindings {

namespace {

void require_number(const KernelCall& call, const char* name, double value, bool right, const char* expected) {
  if (!right)
    call.refuse(std::string(name) + " must be a finite number " + expected + ", got " + std::to_string(value));
  call.number(name, value);
}

void require_numbers(const KernelCall& call, double relaxation, double damping) {
  require_number(call, "relaxation", relaxation, relaxation > 0 && relaxation < 2, "> 0 and < 2");
  require_number(call, "damping", damping, damping >= 0 && std::isfinite(damping), ">= 0");
}

void kaczmarz_step(const char* op, const Argument& displacement, const Argument& input, const Argument& weight,
                   const std::string& dx, bool rectify, double relaxation, double damping,
                   const Argument& weight_change, const Argument& bias_change, const Argument& moved,
                   const py::int_& threads) {
  KernelCall call(op, input, "threads", threads);
  call.floats(input, "BN");
  call.floats(weight, "MN");
  const int64_t B = call.size('B'), N = call.size('N'), M = call.size('M');
  if (B < 1 || N < 1) throw py::value_error(input.label() + " must have numbers, got " + input.shape_text());
  if (M < 1) throw py::value_error(weight.label() + " must have M >= 1, got " + weight.shape_text());
  call.floats(displacement, "BM");
  call.written(weight_change, "MN");
  if (bias_change.given()) call.written(bias_change, "M");
  if (moved.given()) call.written(moved, "BN");
  const auto move = static_cast<KaczmarzMove>(choose(op, "dx", dx, {"mean", "wnorm"}));
  require_numbers(call, relaxation, damping);
  call.run([&]<class T>(T) {
    return KaczmarzStep<T>{.batch = B,
                           .inputs = N,
                           .outputs = M,
                           .displacement = displacement.data<const T>(),
                           .input = input.data<const T>(),
                           .weight = weight.data<const T>(),
                           .move = move,
                           .rectify = rectify,
                           .relaxation = static_cast<T>(relaxation),
                           .damping = static_cast<T>(damping),
                           .weight_change = weight_change.data<T>(),
                           .bias_change = bias_change.data<T>(),
                           .moved = moved.data<T>()};
  });
}

// The tensors of a list, named by their places.
class List {
 public:
  List(const char* op, const char* name, const py::list& values) {
    for (size_t i = 0; i < values.size(); ++i) {
      names_.push_back(std::string(name) + "[" + std::to_string(i) + "]");
      arguments_.emplace_back(op, names_.back().c_str(), py::object(values[i]));
    }
  }
  size_t size() const { return arguments_.size(); }
  const Argument& operator[](size_t i) const { return arguments_[i]; }

 private:
  std::deque<std::string> names_;
  std::deque<Argument> arguments_;
};

void kaczmarz_train(const char* op, const Argument& input, const Argument& labels, const py::list& weights_,
                    const py::list& biases_, double relaxation, double damping, const std::string& dx, double dx_reg,
                    const std::string& output, const Argument& predictions) {
  const List weights(op, "weights", weights_), biases(op, "biases", biases_);
  KernelCall call(op, input);
  call.floats(input, "KN");
  call.integers(labels, "K");
  call.integers(predictions, "K");
  if (weights.size() == 0) call.refuse("weights must have at least 1 tensor, got 0");
  if (biases.size() != 0 && biases.size() != weights.size())
    call.refuse("biases must have 0 or L=" + std::to_string(weights.size()) + " tensors, got " +
                std::to_string(biases.size()));
  int64_t below = call.size('N');
  for (size_t l = 0; l < weights.size(); ++l) {
    weights[l].require_rank({"M", "N"});
    const Dim M{"M", weights[l].size(0)};
    if (M.size < 1) throw py::value_error(weights[l].label() + " must have M >= 1, got " + weights[l].shape_text());
    weights[l].require_shape({M, {"N", below}});
    call.floats(weights[l]);
    if (biases.size() != 0) {
      biases[l].require_shape({M});
      call.floats(biases[l]);
    }
    below = M.size;
  }
  require_numbers(call, relaxation, damping);
  require_number(call, "dx_reg", dx_reg, dx_reg >= 0 && std::isfinite(dx_reg), ">= 0");
  const auto move = static_cast<KaczmarzMove>(choose(op, "dx", dx, {"mean", "wnorm", "regularized"}));
  const auto kind = static_cast<KaczmarzOutput>(choose(op, "output", output, {"clamp", "swap", "direct"}));
  // A copy: once the interpreter's lock is released others may write to what was checked.
  const std::vector<int64_t> checked(labels.data<const int64_t>(), labels.data<const int64_t>() + call.size('K'));
  for (size_t i = 0; i < checked.size(); ++i)
    if (checked[i] < 0 || checked[i] >= below)
      throw py::value_error(labels.label() + " must lie in 0.." + std::to_string(below - 1) + ", got " +
                            std::to_string(checked[i]) + " at " + std::to_string(i));
  std::tuple<std::vector<KaczmarzLayer<float>>, std::vector<KaczmarzLayer<double>>> memory;
  call.run([&]<class T>(T) {
    auto& layers = std::get<std::vector<KaczmarzLayer<T>>>(memory);
    for (size_t l = 0; l < weights.size(); ++l)
      layers.push_back({weights[l].size(1), weights[l].size(0), weights[l].data<T>(),
                        biases.size() == 0 ? nullptr : biases[l].data<T>()});
    return KaczmarzTrain<T>{.samples = call.size('K'),
                            .layer_count = static_cast<int64_t>(layers.size()),
                            .layers = layers.data(),
                            .input = input.data<const T>(),
                            .labels = checked.data(),
                            .relaxation = static_cast<T>(relaxation),
                            .damping = static_cast<T>(damping),
                            .reg = static_cast<T>(dx_reg),
                            .move = move,
                            .output = kind,
                            .predictions = predictions.data<int64_t>()};
  });
}

}  // namespace

void define_kaczmarz(py::module_& m) {
  define(m, "kaczmarz_step", kaczmarz_step,
         {"displacement", "input", "weight", "dx", "rectify", "relaxation", "damping", "weight_change", "bias_change",
          "moved", "threads"});
  define(m, "kaczmarz_train", kaczmarz_train,
         {"input", "labels", "weights", "biases", "relaxation", "damping", "dx", "dx_reg", "output", "predictions"});
}

}  // namespace tpext::bindings
