// The recurrent entries of `_C`. Tensors come as DLPack, outputs are allocated by the caller, the GIL is released while
// a kernel runs.
#include "core/rnn.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/entries.h"
#include "bindings/execution.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

const std::vector<const char*> kNonlinearities = {"tanh", "relu", "identity"};
const std::vector<const char*> kCorrections = {"linearized", "difference", "none"};
const std::vector<const char*> kLayerCorrections = {"linearized", "difference", "none", "learned"};
const std::vector<const char*> kSlopes = {"inverse", "derivative", "one"};
const std::vector<const char*> kCredits = {"local", "through_time"};
const std::vector<const char*> kStorageNames = {"float32", "float64", "bfloat16", "float16"};
constexpr dlpack::DataType kStorageTypes[] = {dlpack::kFloat32, dlpack::kFloat64, dlpack::kBfloat16, dlpack::kFloat16};

// The sizes of a recurrent call, taken from its leading [S, T, B, H] argument, and the checks that follow from them.
class Call {
 public:
  Call(const char* op, const Argument& leading, const Argument& lengths, const std::vector<bool>& reverse,
       const py::object& execution)
      : leading_(leading), execution_(op, leading, execution), reverse_(reverse.begin(), reverse.end()) {
    leading.require_rank({"S", "T", "B", "H"});
    S_ = {"S", leading.size(0)}, T_ = {"T", leading.size(1)}, B_ = {"B", leading.size(2)}, H_ = {"H", leading.size(3)};
    const bool low = leading.dtype() == dlpack::kBfloat16 || leading.dtype() == dlpack::kFloat16;
    if (leading.dtype() == dlpack::kFloat64 || (low && on_cuda())) dtype_ = leading.dtype();
    leading.require_dense(dtype_, leading);
    if (on_cuda() && !countable())
      throw py::value_error(leading.label() + " must have S, T and B * H below 2^31 on CUDA, got " +
                            leading.shape_text());
    if (static_cast<int64_t>(reverse.size()) != S_.size)
      throw py::value_error(std::string(op) + ": reverse must have S=" + std::to_string(S_.size) + " values, got " +
                            std::to_string(reverse.size()));
    if (lengths.given()) {
      lengths.require_shape({B_});
      lengths.require_dense(dlpack::kInt64, leading);
    }
    sizes_ = {S_.size, T_.size, B_.size, H_.size, lengths.data<const int64_t>(), reverse_.data()};
  }

  void sequence(const Argument& argument) const { check(argument, {S_, T_, B_, H_}); }
  void initial(const Argument& argument) const { check(argument, {S_, B_, H_}); }
  void weight(const Argument& argument) const { check(argument, {S_, H_, H_}); }
  void rows(const Argument& argument) const { check(argument, {S_, T_, B_}); }
  void units(const Argument& argument) const { check(argument, {S_, H_}); }
  void optional_sequence(const Argument& argument) const {
    if (argument.given()) sequence(argument);
  }
  void optional_initial(const Argument& argument) const {
    if (argument.given()) initial(argument);
  }
  void written_sequence(const Argument& argument) const {
    sequence(argument);
    if (!on_cuda()) argument.prefer_huge_pages();
  }
  // [S or 1, T, B, I] with any strides but that of I; returns I.
  int64_t input(const Argument& argument) const {
    argument.require_rank({"S or 1", "T", "B", "I"});
    const Dim I{"I", argument.size(3)};
    argument.require_shape({argument.size(0) == 1 ? Dim{"S or 1", 1} : S_, T_, B_, I});
    argument.require_dense_rows(dtype_, leading_);
    return I.size;
  }
  void member_input(const Argument& argument, int64_t inputs) const { check(argument, {S_, T_, B_, {"I", inputs}}); }
  void input_weight(const Argument& argument, int64_t inputs) const { check(argument, {S_, H_, {"I", inputs}}); }
  void none_on_cuda(const Argument& argument) const {
    if (on_cuda() && argument.given()) throw py::value_error(argument.label() + " must be None on CUDA, got a tensor");
  }
  void none_on_cpu(const Argument& argument) const {
    if (!on_cuda() && argument.given())
      throw py::value_error(argument.label() + " must be None on the CPU, got a tensor");
  }

  // What a single step brings, where the call is one: `products` sums of each element.
  void step(int products) const { execution_.require_step(T_.size, products, leading_, S_, B_, H_); }

  const RnnSizes& sizes() const { return sizes_; }
  bool on_cuda() const { return execution_.on_cuda(); }

  // `make(T())` gives the kernel's arguments for elements of type T, `enqueue(arguments, execution)` starts it on CUDA.
  template <class Make, class Enqueue>
  void run(Make make, [[maybe_unused]] Enqueue enqueue) const {
    if (!on_cuda()) return run_on_cpu(make);
    if constexpr (kWithCuda)
      with_storage_type(dtype_, [&](auto type) {
        const auto args = make(type);
        const py::gil_scoped_release release;
        enqueue(args, execution_.rnn());
      });
  }
  template <class Make>
  void run_on_cpu(Make make) const {
    const auto run = [&](auto type) {
      const auto args = make(type);
      const py::gil_scoped_release release;
      cpu::kernels()(args, execution_.threads());
    };
    dtype_ == dlpack::kFloat64 ? run(double()) : run(float());
  }

 private:
  void check(const Argument& argument, std::initializer_list<Dim> dims) const {
    argument.require_shape(dims);
    argument.require_dense(dtype_, leading_);
  }
  // What the CUDA kernels count with 32 bits.
  bool countable() const {
    return S_.size <= kMaxInt && T_.size <= kMaxInt && B_.size <= kMaxInt / std::max<int64_t>(H_.size, 1);
  }

  const Argument& leading_;
  Execution execution_;
  std::vector<uint8_t> reverse_;
  dlpack::DataType dtype_ = dlpack::kFloat32;
  Dim S_{}, T_{}, B_{}, H_{};
  RnnSizes sizes_{};
};

Nonlinearity nonlinearity_of(const char* op, const std::string& value) {
  return static_cast<Nonlinearity>(choose(op, "nonlinearity", value, kNonlinearities));
}

template <class T>
RnnInput<T> input_of(const Argument& input) {
  if (!input.given()) return {};
  return {input.data<const T>(), input.size(3), input.size(0) == 1 ? 0 : input.stride(0), input.stride(1),
          input.stride(2)};
}

void rnn_scan(const py::object& x_proj_, const py::object& input_, const py::object& weight_ih_,
              const py::object& bias_, const py::object& h0_, const py::object& weight_hh_, const py::object& lengths_,
              const std::vector<bool>& reverse, const std::string& nonlinearity, const py::object& states_,
              const py::object& h_n_, const py::object& execution) {
  constexpr const char* op = "rnn_scan";
  const Argument x_proj(op, "x_proj", x_proj_), input(op, "input", input_), weight_ih(op, "weight_ih", weight_ih_),
      bias(op, "bias", bias_), h0(op, "h0", h0_), weight_hh(op, "weight_hh", weight_hh_),
      lengths(op, "lengths", lengths_), states(op, "states", states_), h_n(op, "h_n", h_n_);
  const Call call(op, states, lengths, reverse, execution);
  for (const Argument* argument : {&input, &weight_ih, &bias}) call.none_on_cuda(*argument);
  if (x_proj.given() || call.on_cuda()) {
    call.sequence(x_proj);
  } else {
    call.input_weight(weight_ih, call.input(input));
    if (bias.given()) call.units(bias);
  }
  call.initial(h0);
  call.weight(weight_hh);
  call.written_sequence(states);
  call.optional_initial(h_n);
  call.step(1);
  const Nonlinearity a = nonlinearity_of(op, nonlinearity);
  const auto args = [&]<class T>(T) {
    return RnnScan<T>{.sizes = call.sizes(),
                      .nonlinearity = a,
                      .x_proj = x_proj.data<const T>(),
                      .input = input_of<T>(input),
                      .weight_ih = weight_ih.data<const T>(),
                      .bias = bias.data<const T>(),
                      .h0 = h0.data<const T>(),
                      .weight_hh = weight_hh.data<const T>(),
                      .states = states.data<T>(),
                      .h_n = h_n.data<T>()};
  };
  call.run(args, [](const auto& a, const auto& where) { cuda::rnn_scan(a, where); });
}

template <class Make>
void run_target_scan(const Call& call, const Argument& displacement_of_state, Make make) {
  call.run(make, [&]<class T>(const RnnTargetScan<T>& args, const auto& where) {
    cuda::rnn_target_scan(args, displacement_of_state.data<T>(), where);
  });
}

void rnn_target_scan(const py::object& grad_states_, const py::object& disp_n_, const py::object& credit_n_,
                     const py::object& states_, const py::object& h0_, const py::object& weight_hh_,
                     const py::object& inverse_, const py::object& x_proj_, const py::object& lengths_,
                     const std::vector<bool>& reverse, const std::string& nonlinearity, const std::string& correction,
                     const std::string& credit, double target_step, double margin, const std::string& slope,
                     double slope_reg, const py::object& delta_, const py::object& disp_h0_,
                     const py::object& credit_h0_, const py::object& norms_, const py::object& displacement_,
                     const py::object& displacement_of_state_, const py::object& execution) {
  constexpr const char* op = "rnn_target_scan";
  const Argument grad_states(op, "grad_states", grad_states_), disp_n(op, "disp_n", disp_n_),
      credit_n(op, "credit_n", credit_n_), states(op, "states", states_), h0(op, "h0", h0_),
      weight_hh(op, "weight_hh", weight_hh_), inverse(op, "inverse", inverse_), x_proj(op, "x_proj", x_proj_),
      lengths(op, "lengths", lengths_), delta(op, "delta", delta_), disp_h0(op, "disp_h0", disp_h0_),
      credit_h0(op, "credit_h0", credit_h0_), norms(op, "norms", norms_),
      displacement(op, "displacement", displacement_),
      displacement_of_state(op, "displacement_of_state", displacement_of_state_);
  const Call call(op, states, lengths, reverse, execution);
  const Nonlinearity a = nonlinearity_of(op, nonlinearity);
  const auto c = static_cast<Correction>(choose(op, "correction", correction, kCorrections));
  const auto by = static_cast<Slope>(choose(op, "slope", slope, kSlopes));
  const bool through_time = choose(op, "credit", credit, kCredits) == 1;
  call.optional_sequence(grad_states);
  call.optional_initial(disp_n);
  call.optional_initial(credit_n);
  call.initial(h0);
  call.weight(weight_hh);
  call.weight(inverse);
  if (c == Correction::none) call.sequence(x_proj);
  call.written_sequence(delta);
  call.initial(disp_h0);
  call.optional_initial(credit_h0);
  call.none_on_cuda(norms);
  if (norms.given()) call.rows(norms);
  if (displacement.given()) call.written_sequence(displacement);
  call.none_on_cpu(displacement_of_state);
  call.optional_sequence(displacement_of_state);
  call.step(through_time ? 2 : 1);
  run_target_scan(call, displacement_of_state, [&]<class T>(T) {
    return RnnTargetScan<T>{.sizes = call.sizes(),
                            .nonlinearity = a,
                            .correction = c,
                            .through_time = through_time,
                            .slope = by,
                            .target_step = static_cast<Compute<T>>(target_step),
                            .margin = static_cast<Compute<T>>(margin),
                            .slope_reg = static_cast<Compute<T>>(slope_reg),
                            .grad_states = grad_states.data<const T>(),
                            .disp_n = disp_n.data<const T>(),
                            .credit_n = credit_n.data<const T>(),
                            .states = states.data<const T>(),
                            .h0 = h0.data<const T>(),
                            .weight_hh = weight_hh.data<const T>(),
                            .inverse = inverse.data<const T>(),
                            .is_feedback = false,
                            .x_proj = x_proj.data<const T>(),
                            .reverse_pre = nullptr,
                            .delta = delta.data<T>(),
                            .disp_h0 = disp_h0.data<T>(),
                            .credit_h0 = credit_h0.data<T>(),
                            .norms = norms.data<T>(),
                            .displacement = displacement.data<T>()};
  });
}

void rnn_learned_target_scan(const py::object& grad_states_, const py::object& disp_n_, const py::object& credit_n_,
                             const py::object& states_, const py::object& weight_hh_, const py::object& reverse_weight_,
                             const py::object& reverse_pre_, const py::object& lengths_,
                             const std::vector<bool>& reverse, const std::string& nonlinearity,
                             const std::string& credit, double target_step, const py::object& delta_,
                             const py::object& disp_h0_, const py::object& credit_h0_, const py::object& norms_,
                             const py::object& displacement_of_state_, const py::object& execution) {
  constexpr const char* op = "rnn_learned_target_scan";
  const Argument grad_states(op, "grad_states", grad_states_), disp_n(op, "disp_n", disp_n_),
      credit_n(op, "credit_n", credit_n_), states(op, "states", states_), weight_hh(op, "weight_hh", weight_hh_),
      reverse_weight(op, "reverse_weight", reverse_weight_), reverse_pre(op, "reverse_pre", reverse_pre_),
      lengths(op, "lengths", lengths_), delta(op, "delta", delta_), disp_h0(op, "disp_h0", disp_h0_),
      credit_h0(op, "credit_h0", credit_h0_), norms(op, "norms", norms_),
      displacement_of_state(op, "displacement_of_state", displacement_of_state_);
  const Call call(op, states, lengths, reverse, execution);
  const Nonlinearity a = nonlinearity_of(op, nonlinearity);
  const bool through_time = choose(op, "credit", credit, kCredits) == 1;
  call.optional_sequence(grad_states);
  call.optional_initial(disp_n);
  call.optional_initial(credit_n);
  call.weight(weight_hh);
  call.weight(reverse_weight);
  call.sequence(reverse_pre);
  call.written_sequence(delta);
  call.initial(disp_h0);
  call.optional_initial(credit_h0);
  call.none_on_cuda(norms);
  if (norms.given()) call.rows(norms);
  call.none_on_cpu(displacement_of_state);
  call.optional_sequence(displacement_of_state);
  call.step(through_time ? 2 : 1);
  run_target_scan(call, displacement_of_state, [&]<class T>(T) {
    return RnnTargetScan<T>{.sizes = call.sizes(),
                            .nonlinearity = a,
                            .correction = Correction::learned,
                            .through_time = through_time,
                            .slope = Slope::inverse,
                            .target_step = static_cast<Compute<T>>(target_step),
                            .margin = 0,
                            .slope_reg = 0,
                            .grad_states = grad_states.data<const T>(),
                            .disp_n = disp_n.data<const T>(),
                            .credit_n = credit_n.data<const T>(),
                            .states = states.data<const T>(),
                            .h0 = nullptr,
                            .weight_hh = weight_hh.data<const T>(),
                            .inverse = reverse_weight.data<const T>(),
                            .is_feedback = false,
                            .x_proj = nullptr,
                            .reverse_pre = reverse_pre.data<const T>(),
                            .delta = delta.data<T>(),
                            .disp_h0 = disp_h0.data<T>(),
                            .credit_h0 = credit_h0.data<T>(),
                            .norms = norms.data<T>(),
                            .displacement = nullptr};
  });
}

void rnn_weight_gradients(const py::object& delta_, const py::object& states_, const py::object& h0_,
                          const py::object& input_, const py::object& lengths_, const std::vector<bool>& reverse,
                          double scale, const py::object& grad_weight_ih_, const py::object& grad_weight_hh_,
                          const py::object& grad_bias_, const py::object& execution) {
  constexpr const char* op = "rnn_weight_gradients";
  const Argument delta(op, "delta", delta_), states(op, "states", states_), h0(op, "h0", h0_),
      input(op, "input", input_), lengths(op, "lengths", lengths_),
      grad_weight_ih(op, "grad_weight_ih", grad_weight_ih_), grad_weight_hh(op, "grad_weight_hh", grad_weight_hh_),
      grad_bias(op, "grad_bias", grad_bias_);
  const Call call(op, delta, lengths, reverse, execution);
  if (call.on_cuda())
    throw py::value_error(delta.label() +
                          " must be on the CPU: on CUDA torch's matrix products compute these gradients");
  call.sequence(states);
  call.initial(h0);
  const int64_t inputs = call.input(input);
  if (grad_weight_ih.given()) call.input_weight(grad_weight_ih, inputs);
  if (grad_weight_hh.given()) call.weight(grad_weight_hh);
  if (grad_bias.given()) call.units(grad_bias);
  call.run_on_cpu([&]<class T>(T) {
    return RnnWeightGradients<T>{.sizes = call.sizes(),
                                 .scale = static_cast<Compute<T>>(scale),
                                 .delta = delta.data<const T>(),
                                 .states = states.data<const T>(),
                                 .h0 = h0.data<const T>(),
                                 .input = input_of<T>(input),
                                 .grad_weight_ih = grad_weight_ih.data<T>(),
                                 .grad_weight_hh = grad_weight_hh.data<T>(),
                                 .grad_bias = grad_bias.data<T>()};
  });
}

void rnn_layer_backward(const py::object& grad_states_, const py::object& disp_n_, const py::object& credit_n_,
                        const py::object& input_, const py::object& states_, const py::object& h0_,
                        const py::object& weight_hh_, const py::object& feedback_, bool transposed,
                        const py::object& input_feedback_, const py::object& pre_, const py::object& lengths_,
                        const std::vector<bool>& reverse, const std::string& nonlinearity,
                        const std::string& correction, const std::string& credit, double target_step, double margin,
                        const std::string& slope, double slope_reg, double scale, double input_scale,
                        bool of_displacement, const py::object& grad_input_, const py::object& grad_weight_ih_,
                        const py::object& grad_weight_hh_, const py::object& grad_bias_, const py::object& disp_h0_,
                        const py::object& credit_h0_, const py::object& execution) {
  constexpr const char* op = "rnn_layer_backward";
  const Argument grad_states(op, "grad_states", grad_states_), disp_n(op, "disp_n", disp_n_),
      credit_n(op, "credit_n", credit_n_), input(op, "input", input_), states(op, "states", states_), h0(op, "h0", h0_),
      weight_hh(op, "weight_hh", weight_hh_), feedback(op, "feedback", feedback_),
      input_feedback(op, "input_feedback", input_feedback_), pre(op, "pre", pre_), lengths(op, "lengths", lengths_),
      grad_input(op, "grad_input", grad_input_), grad_weight_ih(op, "grad_weight_ih", grad_weight_ih_),
      grad_weight_hh(op, "grad_weight_hh", grad_weight_hh_), grad_bias(op, "grad_bias", grad_bias_),
      disp_h0(op, "disp_h0", disp_h0_), credit_h0(op, "credit_h0", credit_h0_);
  const Call call(op, states, lengths, reverse, execution);
  if (call.on_cuda())
    throw py::value_error(states.label() +
                          " must be on the CPU: on CUDA a pass that leaves delta and torch's products do this");
  const Nonlinearity a = nonlinearity_of(op, nonlinearity);
  const auto c = static_cast<Correction>(choose(op, "correction", correction, kLayerCorrections));
  const auto by = static_cast<Slope>(choose(op, "slope", slope, kSlopes));
  const bool through_time = choose(op, "credit", credit, kCredits) == 1;
  call.optional_sequence(grad_states);
  call.optional_initial(disp_n);
  call.optional_initial(credit_n);
  const int64_t inputs = call.input(input);
  call.initial(h0);
  call.weight(weight_hh);
  call.weight(feedback);
  if (c == Correction::none || c == Correction::learned) call.sequence(pre);
  if (grad_input.given()) {
    call.input_weight(input_feedback, inputs);
    call.member_input(grad_input, inputs);
  }
  if (grad_weight_ih.given()) call.input_weight(grad_weight_ih, inputs);
  if (grad_weight_hh.given()) call.weight(grad_weight_hh);
  if (grad_bias.given()) call.units(grad_bias);
  call.initial(disp_h0);
  call.optional_initial(credit_h0);
  call.run_on_cpu([&]<class T>(T) {
    return RnnLayerBackward<T>{.pass = {.sizes = call.sizes(),
                                        .nonlinearity = a,
                                        .correction = c,
                                        .through_time = through_time,
                                        .slope = by,
                                        .target_step = static_cast<T>(target_step),
                                        .margin = static_cast<T>(margin),
                                        .slope_reg = static_cast<T>(slope_reg),
                                        .grad_states = grad_states.data<const T>(),
                                        .disp_n = disp_n.data<const T>(),
                                        .credit_n = credit_n.data<const T>(),
                                        .states = states.data<const T>(),
                                        .h0 = h0.data<const T>(),
                                        .weight_hh = weight_hh.data<const T>(),
                                        .inverse = feedback.data<const T>(),
                                        .is_feedback = !transposed,
                                        .x_proj = c == Correction::none ? pre.data<const T>() : nullptr,
                                        .reverse_pre = c == Correction::learned ? pre.data<const T>() : nullptr,
                                        .delta = nullptr,
                                        .disp_h0 = disp_h0.data<T>(),
                                        .credit_h0 = credit_h0.data<T>(),
                                        .norms = nullptr,
                                        .displacement = nullptr},
                               .parameters = {.sizes = call.sizes(),
                                              .scale = static_cast<T>(scale),
                                              .delta = nullptr,
                                              .states = states.data<const T>(),
                                              .h0 = h0.data<const T>(),
                                              .input = input_of<T>(input),
                                              .grad_weight_ih = grad_weight_ih.data<T>(),
                                              .grad_weight_hh = grad_weight_hh.data<T>(),
                                              .grad_bias = grad_bias.data<T>()},
                               .input_feedback = input_feedback.data<const T>(),
                               .of_displacement = of_displacement,
                               .input_scale = static_cast<T>(input_scale),
                               .grad_input = grad_input.data<T>()};
  });
}

// What a scan of these sizes runs as on a CUDA device: the regime, the bytes of zeroed workspace, predicted cycles.
py::tuple rnn_plan(int products, const std::string& dtype, int64_t stack, int64_t batch, int64_t hidden, int device,
                   const std::string& regime) {
  constexpr const char* op = "rnn_plan";
  require_cuda();
  if (products < 1 || products > 2)
    throw py::value_error(std::string(op) + ": products must be 1 or 2, got " + std::to_string(products));
  const dlpack::DataType type = kStorageTypes[choose(op, "dtype", dtype, kStorageNames)];
  for (const Dim& size : {Dim{"stack", stack}, Dim{"batch", batch}, Dim{"hidden", hidden}})
    if (size.size < 0 || size.size > kMaxInt)
      throw py::value_error(std::string(op) + ": " + size.symbol + " must lie in 0..2^31-1, got " +
                            std::to_string(size.size));
  if (batch * hidden > kMaxInt)
    throw py::value_error(std::string(op) + ": batch * hidden must be below 2^31, got " + std::to_string(batch) +
                          " * " + std::to_string(hidden));
  if (device < 0) throw py::value_error(std::string(op) + ": device must be >= 0, got " + std::to_string(device));
  const auto wanted = static_cast<cuda::Regime>(choose(op, "regime", regime, kRegimes));
  const auto plan = with_storage_type(type, [&]<class T>(T) {
    // Within the template: outside, an unoptimised build would keep what is discarded and ask for its symbols.
    if constexpr (kWithCuda) return cuda::plan_rnn<T>(products, stack, batch, hidden, device, wanted);
    return cuda::RnnPlan{};
  });
  return py::make_tuple(kRegimes[static_cast<size_t>(plan.regime)], plan.workspace_bytes, plan.cycles);
}

}  // namespace

void define_rnn(py::module_& m) {
  m.def("rnn_plan", &rnn_plan, py::arg("products"), py::arg("dtype"), py::arg("stack"), py::arg("batch"),
        py::arg("hidden"), py::arg("device"), py::arg("regime"));
  m.def("rnn_layer_backward", &rnn_layer_backward, py::arg("grad_states"), py::arg("disp_n"), py::arg("credit_n"),
        py::arg("input"), py::arg("states"), py::arg("h0"), py::arg("weight_hh"), py::arg("feedback"),
        py::arg("transposed"), py::arg("input_feedback"), py::arg("pre"), py::arg("lengths"), py::arg("reverse"),
        py::arg("nonlinearity"), py::arg("correction"), py::arg("credit"), py::arg("target_step"), py::arg("margin"),
        py::arg("slope"), py::arg("slope_reg"), py::arg("scale"), py::arg("input_scale"), py::arg("of_displacement"),
        py::arg("grad_input"), py::arg("grad_weight_ih"), py::arg("grad_weight_hh"), py::arg("grad_bias"),
        py::arg("disp_h0"), py::arg("credit_h0"), py::arg("execution"));
  m.def("rnn_scan", &rnn_scan, py::arg("x_proj"), py::arg("input"), py::arg("weight_ih"), py::arg("bias"),
        py::arg("h0"), py::arg("weight_hh"), py::arg("lengths"), py::arg("reverse"), py::arg("nonlinearity"),
        py::arg("states"), py::arg("h_n"), py::arg("execution"));
  m.def("rnn_target_scan", &rnn_target_scan, py::arg("grad_states"), py::arg("disp_n"), py::arg("credit_n"),
        py::arg("states"), py::arg("h0"), py::arg("weight_hh"), py::arg("inverse"), py::arg("x_proj"),
        py::arg("lengths"), py::arg("reverse"), py::arg("nonlinearity"), py::arg("correction"), py::arg("credit"),
        py::arg("target_step"), py::arg("margin"), py::arg("slope"), py::arg("slope_reg"), py::arg("delta"),
        py::arg("disp_h0"), py::arg("credit_h0"), py::arg("norms"), py::arg("displacement"),
        py::arg("displacement_of_state"), py::arg("execution"));
  m.def("rnn_learned_target_scan", &rnn_learned_target_scan, py::arg("grad_states"), py::arg("disp_n"),
        py::arg("credit_n"), py::arg("states"), py::arg("weight_hh"), py::arg("reverse_weight"), py::arg("reverse_pre"),
        py::arg("lengths"), py::arg("reverse"), py::arg("nonlinearity"), py::arg("credit"), py::arg("target_step"),
        py::arg("delta"), py::arg("disp_h0"), py::arg("credit_h0"), py::arg("norms"), py::arg("displacement_of_state"),
        py::arg("execution"));
  m.def("rnn_weight_gradients", &rnn_weight_gradients, py::arg("delta"), py::arg("states"), py::arg("h0"),
        py::arg("input"), py::arg("lengths"), py::arg("reverse"), py::arg("scale"), py::arg("grad_weight_ih"),
        py::arg("grad_weight_hh"), py::arg("grad_bias"), py::arg("execution"));
}

}  // namespace tpext::bindings
