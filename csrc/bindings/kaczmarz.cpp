// The entries `_C.kaczmarz_step` and `_C.kaczmarz_train`.
#include "core/kaczmarz.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <deque>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/entries.h"
#include "bindings/execution.h"
#include "cpu/kernels.h"

namespace tpext::bindings {

namespace {

constexpr const char* kOp = "kaczmarz_train";

void require_number(const char* op, const char* name, double value, bool right, const char* expected) {
  if (!right)
    throw py::value_error(std::string(op) + ": " + name + " must be a finite number " + expected + ", got " +
                          std::to_string(value));
}

void require_numbers(const char* op, double relaxation, double damping) {
  require_number(op, "relaxation", relaxation, relaxation > 0 && relaxation < 2, "> 0 and < 2");
  require_number(op, "damping", damping, damping >= 0 && std::isfinite(damping), ">= 0");
}

void kaczmarz_step(const py::object& displacement_, const py::object& input_, const py::object& weight_,
                   const std::string& dx, bool rectify, double relaxation, double damping,
                   const py::object& weight_change_, const py::object& bias_change_, const py::object& moved_,
                   const py::int_& threads_) {
  constexpr const char* op = "kaczmarz_step";
  const Argument displacement(op, "displacement", displacement_), input(op, "input", input_),
      weight(op, "weight", weight_), weight_change(op, "weight_change", weight_change_),
      bias_change(op, "bias_change", bias_change_), moved(op, "moved", moved_);
  input.require_rank({"B", "N"});
  if (input.device().type != dlpack::kCpu)
    throw py::value_error(input.label() + " must be on the CPU, got " + device_name(input.device()));
  const bool is_double = input.dtype() == dlpack::kFloat64;
  const dlpack::DataType dtype = is_double ? dlpack::kFloat64 : dlpack::kFloat32;
  weight.require_rank({"M", "N"});
  const Dim B{"B", input.size(0)}, N{"N", input.size(1)}, M{"M", weight.size(0)};
  if (B.size < 1 || N.size < 1) throw py::value_error(input.label() + " must have numbers, got " + input.shape_text());
  if (M.size < 1) throw py::value_error(weight.label() + " must have M >= 1, got " + weight.shape_text());
  weight.require_shape({M, N});
  displacement.require_shape({B, M});
  weight_change.require_shape({M, N});
  for (const Argument* each : {&input, &displacement, &weight, &weight_change}) each->require_dense(dtype, input);
  if (bias_change.given()) {
    bias_change.require_shape({M});
    bias_change.require_dense(dtype, input);
  }
  if (moved.given()) {
    moved.require_shape({B, N});
    moved.require_dense(dtype, input);
  }
  const auto move = static_cast<KaczmarzMove>(choose(op, "dx", dx, {"mean", "wnorm"}));
  require_numbers(op, relaxation, damping);
  const int threads = threads_of(op, "threads", threads_);
  const auto run = [&]<class T>(T) {
    const KaczmarzStep<T> args{B.size,
                               N.size,
                               M.size,
                               displacement.data<const T>(),
                               input.data<const T>(),
                               weight.data<const T>(),
                               move,
                               rectify,
                               static_cast<T>(relaxation),
                               static_cast<T>(damping),
                               weight_change.data<T>(),
                               bias_change.data<T>(),
                               moved.data<T>()};
    const py::gil_scoped_release release;
    cpu::kernels()(args, threads);
  };
  is_double ? run(double()) : run(float());
}

// The arguments of a list, named by their places; the names must outlive them.
void read(const char* name, const py::list& values, std::deque<std::string>& names, std::deque<Argument>& arguments) {
  for (size_t i = 0; i < values.size(); ++i) {
    names.push_back(std::string(name) + "[" + std::to_string(i) + "]");
    arguments.emplace_back(kOp, names.back().c_str(), py::object(values[i]));
  }
}

void kaczmarz_train(const py::object& input_, const py::object& labels_, const py::list& weights_,
                    const py::list& biases_, double relaxation, double damping, const std::string& dx, double dx_reg,
                    const std::string& output, const py::object& predictions_) {
  const Argument input(kOp, "input", input_), labels(kOp, "labels", labels_),
      predictions(kOp, "predictions", predictions_);
  std::deque<std::string> names;
  std::deque<Argument> weights, biases;
  read("weights", weights_, names, weights);
  read("biases", biases_, names, biases);
  input.require_rank({"K", "N"});
  if (input.device().type != dlpack::kCpu)
    throw py::value_error(input.label() + " must be on the CPU, got " + device_name(input.device()));
  const bool is_double = input.dtype() == dlpack::kFloat64;
  const dlpack::DataType dtype = is_double ? dlpack::kFloat64 : dlpack::kFloat32;
  const Dim K{"K", input.size(0)};
  input.require_dense(dtype, input);
  labels.require_shape({K});
  labels.require_dense(dlpack::kInt64, input);
  predictions.require_shape({K});
  predictions.require_dense(dlpack::kInt64, input);
  if (weights.empty()) throw py::value_error(std::string(kOp) + ": weights must have at least 1 tensor, got 0");
  if (!biases.empty() && biases.size() != weights.size())
    throw py::value_error(std::string(kOp) + ": biases must have 0 or L=" + std::to_string(weights.size()) +
                          " tensors, got " + std::to_string(biases.size()));
  int64_t below = input.size(1);
  for (size_t l = 0; l < weights.size(); ++l) {
    weights[l].require_rank({"M", "N"});
    const Dim M{"M", weights[l].size(0)};
    if (M.size < 1) throw py::value_error(weights[l].label() + " must have M >= 1, got " + weights[l].shape_text());
    weights[l].require_shape({M, {"N", below}});
    weights[l].require_dense(dtype, input);
    if (!biases.empty()) {
      biases[l].require_shape({M});
      biases[l].require_dense(dtype, input);
    }
    below = M.size;
  }
  require_numbers(kOp, relaxation, damping);
  require_number(kOp, "dx_reg", dx_reg, dx_reg >= 0 && std::isfinite(dx_reg), ">= 0");
  const auto move = static_cast<KaczmarzMove>(choose(kOp, "dx", dx, {"mean", "wnorm", "regularized"}));
  const auto kind = static_cast<KaczmarzOutput>(choose(kOp, "output", output, {"clamp", "swap", "direct"}));
  // A copy: once the interpreter's lock is released others may write to what was checked.
  const std::vector<int64_t> checked(labels.data<const int64_t>(), labels.data<const int64_t>() + K.size);
  for (size_t i = 0; i < checked.size(); ++i)
    if (checked[i] < 0 || checked[i] >= below)
      throw py::value_error(labels.label() + " must lie in 0.." + std::to_string(below - 1) + ", got " +
                            std::to_string(checked[i]) + " at " + std::to_string(i));
  const auto run = [&]<class T>(T) {
    std::vector<KaczmarzLayer<T>> layers;
    for (size_t l = 0; l < weights.size(); ++l)
      layers.push_back({weights[l].size(1), weights[l].size(0), weights[l].data<T>(),
                        biases.empty() ? nullptr : biases[l].data<T>()});
    const KaczmarzTrain<T> args{K.size,
                                static_cast<int64_t>(layers.size()),
                                layers.data(),
                                input.data<const T>(),
                                checked.data(),
                                static_cast<T>(relaxation),
                                static_cast<T>(damping),
                                static_cast<T>(dx_reg),
                                move,
                                kind,
                                predictions.data<int64_t>()};
    const py::gil_scoped_release release;
    cpu::kernels()(args, 1);
  };
  is_double ? run(double()) : run(float());
}

}  // namespace

void define_kaczmarz(py::module_& m) {
  m.def("kaczmarz_step", &kaczmarz_step, py::arg("displacement"), py::arg("input"), py::arg("weight"), py::arg("dx"),
        py::arg("rectify"), py::arg("relaxation"), py::arg("damping"), py::arg("weight_change"), py::arg("bias_change"),
        py::arg("moved"), py::arg("threads"));
  m.def("kaczmarz_train", &kaczmarz_train, py::arg("input"), py::arg("labels"), py::arg("weights"), py::arg("biases"),
        py::arg("relaxation"), py::arg("damping"), py::arg("dx"), py::arg("dx_reg"), py::arg("output"),
        py::arg("predictions"));
}

}  // namespace tpext::bindings
