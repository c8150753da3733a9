// The recurrent entries of `_C`.
#include "core/rnn.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/entries.h"
#include "bindings/rnn_call.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

namespace {

const std::vector<const char*> kCorrections = {"linearized", "difference", "none", "learned"};
const std::vector<const char*> kScanCorrections = {"linearized", "difference", "none"};

Nonlinearity read_nonlinearity(const KernelCall& call, const std::string& name) {
  return static_cast<Nonlinearity>(choose(call.op(), "nonlinearity", name, {"tanh", "relu", "identity"}));
}

Correction read_correction(const KernelCall& call, const std::string& name, const std::vector<const char*>& choices) {
  return static_cast<Correction>(choose(call.op(), "correction", name, choices));
}

void rnn_scan(const char* op, const Argument& x_proj, const Argument& input, const Argument& weight_ih,
              const Argument& bias, const Argument& h0, const Argument& weight_hh, const Argument& lengths,
              const std::vector<bool>& reverse, const std::string& nonlinearity, const Argument& states,
              const Argument& h_n, const py::object& execution) {
  RnnCall call(op, states, lengths, reverse, execution);
  for (const Argument* argument : {&input, &weight_ih, &bias}) call.none_on_cuda(*argument);
  if (x_proj.given() || call.on_cuda()) {
    call.floats(x_proj, "STBH");
  } else {
    call.input(input);
    call.floats(weight_ih, "SHI");
    call.optional(bias, "SH");
  }
  call.floats(h0, "SBH");
  call.floats(weight_hh, "SHH");
  call.written(states, "STBH");
  call.optional(h_n, "SBH");
  const Nonlinearity a = read_nonlinearity(call, nonlinearity);
  call.run_scan(
      {1, 1, 1},
      [&]<class T>(T) {
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
      },
      [](const auto& args, const auto& where) { cuda::rnn_scan(args, where); });
}

struct PassSettings {
  Nonlinearity nonlinearity;
  Correction correction;
  bool through_time;
  Slope slope;
  const Numbers &target_step, &margin, &slope_reg;
};

// What every target pass takes. Errors give the tensors the names that they have in the entry.
struct TargetPass {
  const Argument &grad_states, &disp_n, &credit_n, &states;
  const Argument* h0;  // null for "learned", which does not need it
  const Argument &weight_hh, &feedback;
  bool transposed;      // `feedback` is P'
  const Argument& pre;  // x_proj of "none", reverse_pre of "learned"
  const Argument &disp_h0, &credit_h0;
  PassSettings settings;

  void check(RnnCall& call) const {
    for (const Numbers* numbers : {&settings.target_step, &settings.margin, &settings.slope_reg})
      call.numbers(*numbers);
    call.optional(grad_states, "STBH");
    call.optional(disp_n, "SBH");
    call.optional(credit_n, "SBH");
    if (h0 != nullptr) call.floats(*h0, "SBH");
    call.floats(weight_hh, "SHH");
    call.floats(feedback, "SHH");
    if (settings.correction == Correction::none || settings.correction == Correction::learned) call.floats(pre, "STBH");
    call.floats(disp_h0, "SBH");
    call.optional(credit_h0, "SBH");
  }

  // Without delta, norms and displacement.
  template <class T>
  RnnTargetScan<T> args(const RnnSizes& sizes) const {
    return {.sizes = sizes,
            .nonlinearity = settings.nonlinearity,
            .correction = settings.correction,
            .through_time = settings.through_time,
            .slope = settings.slope,
            .target_step = settings.target_step.as<Compute<T>>(),
            .margin = settings.margin.as<Compute<T>>(),
            .slope_reg = settings.slope_reg.as<Compute<T>>(),
            .grad_states = grad_states.data<const T>(),
            .disp_n = disp_n.data<const T>(),
            .credit_n = credit_n.data<const T>(),
            .states = states.data<const T>(),
            .h0 = h0 == nullptr ? nullptr : h0->data<const T>(),
            .weight_hh = weight_hh.data<const T>(),
            .inverse = feedback.data<const T>(),
            .is_feedback = !transposed,
            .x_proj = settings.correction == Correction::none ? pre.data<const T>() : nullptr,
            .reverse_pre = settings.correction == Correction::learned ? pre.data<const T>() : nullptr,
            .delta = nullptr,
            .disp_h0 = disp_h0.data<T>(),
            .credit_h0 = credit_h0.data<T>(),
            .norms = nullptr,
            .displacement = nullptr};
  }
};

// A pass that leaves delta in memory; `displacement` may be null.
void run_target_scan(RnnCall& call, const TargetPass& pass, const Argument& delta, const Argument& norms,
                     const Argument* displacement, const Argument& displacement_of_state) {
  pass.check(call);
  call.written(delta, "STBH");
  call.none_on_cuda(norms);
  call.optional(norms, "STB");
  if (displacement != nullptr && displacement->given()) call.written(*displacement, "STBH");
  call.none_on_cpu(displacement_of_state);
  call.optional(displacement_of_state, "STBH");
  call.run_scan(
      {pass.settings.through_time ? 2 : 1, 1, 1},
      [&]<class T>(T) {
        RnnTargetScan<T> args = pass.args<T>(call.sizes());
        args.delta = delta.data<T>();
        args.norms = norms.data<T>();
        if (displacement != nullptr) args.displacement = displacement->data<T>();
        return args;
      },
      [&]<class T>(const RnnTargetScan<T>& args, const auto& where) {
        cuda::rnn_target_scan(args, displacement_of_state.data<T>(), where);
      });
}

void rnn_target_scan(const char* op, const Argument& grad_states, const Argument& disp_n, const Argument& credit_n,
                     const Argument& states, const Argument& h0, const Argument& weight_hh, const Argument& inverse,
                     const Argument& x_proj, const Argument& lengths, const std::vector<bool>& reverse,
                     const std::string& nonlinearity, const std::string& correction, const std::string& credit,
                     const Numbers& target_step, const Numbers& margin, const std::string& slope,
                     const Numbers& slope_reg, const Argument& delta, const Argument& disp_h0,
                     const Argument& credit_h0, const Argument& norms, const Argument& displacement,
                     const Argument& displacement_of_state, const py::object& execution) {
  RnnCall call(op, states, lengths, reverse, execution);
  const PassSettings settings{read_nonlinearity(call, nonlinearity),
                              read_correction(call, correction, kScanCorrections),
                              read_credit(call, credit),
                              read_slope(call, slope),
                              target_step,
                              margin,
                              slope_reg};
  const TargetPass pass{grad_states, disp_n, credit_n, states,  &h0,       weight_hh,
                        inverse,     true,   x_proj,   disp_h0, credit_h0, settings};
  run_target_scan(call, pass, delta, norms, &displacement, displacement_of_state);
}

void rnn_learned_target_scan(const char* op, const Argument& grad_states, const Argument& disp_n,
                             const Argument& credit_n, const Argument& states, const Argument& weight_hh,
                             const Argument& reverse_weight, const Argument& reverse_pre, const Argument& lengths,
                             const std::vector<bool>& reverse, const std::string& nonlinearity,
                             const std::string& credit, const Numbers& target_step, const Argument& delta,
                             const Argument& disp_h0, const Argument& credit_h0, const Argument& norms,
                             const Argument& displacement_of_state, const py::object& execution) {
  RnnCall call(op, states, lengths, reverse, execution);
  const Numbers margin("margin", {0}), slope_reg("slope_reg", {0});
  const PassSettings settings{read_nonlinearity(call, nonlinearity),
                              Correction::learned,
                              read_credit(call, credit),
                              Slope::inverse,
                              target_step,
                              margin,
                              slope_reg};
  const TargetPass pass{grad_states,    disp_n, credit_n,    states,  nullptr,   weight_hh,
                        reverse_weight, true,   reverse_pre, disp_h0, credit_h0, settings};
  run_target_scan(call, pass, delta, norms, nullptr, displacement_of_state);
}

// The gradients [dU, dW, db], any of which may be absent.
void check_parameters(RnnCall& call, const Argument& grad_weight_ih, const Argument& grad_weight_hh,
                      const Argument& grad_bias) {
  call.optional(grad_weight_ih, "SHI");
  call.optional(grad_weight_hh, "SHH");
  call.optional(grad_bias, "SH");
}

void rnn_weight_gradients(const char* op, const Argument& delta, const Argument& states, const Argument& h0,
                          const Argument& input, const Argument& lengths, const std::vector<bool>& reverse,
                          const Numbers& scale, const Argument& grad_weight_ih, const Argument& grad_weight_hh,
                          const Argument& grad_bias, const py::object& execution) {
  RnnCall call(op, delta, lengths, reverse, execution);
  if (call.on_cuda())
    throw py::value_error(delta.label() +
                          " must be on the CPU: on CUDA torch's matrix products compute these gradients");
  call.floats(states, "STBH");
  call.floats(h0, "SBH");
  call.input(input);
  call.numbers(scale);
  check_parameters(call, grad_weight_ih, grad_weight_hh, grad_bias);
  call.run([&]<class T>(T) {
    return RnnWeightGradients<T>{.sizes = call.sizes(),
                                 .scale = scale.as<T>(),
                                 .delta = delta.data<const T>(),
                                 .states = states.data<const T>(),
                                 .h0 = h0.data<const T>(),
                                 .input = input_of<T>(input),
                                 .grad_weight_ih = grad_weight_ih.data<T>(),
                                 .grad_weight_hh = grad_weight_hh.data<T>(),
                                 .grad_bias = grad_bias.data<T>(),
                                 .grad_bias_hh = nullptr};
  });
}

void rnn_layer_backward(const char* op, const Argument& grad_states, const Argument& disp_n, const Argument& credit_n,
                        const Argument& input, const Argument& states, const Argument& h0, const Argument& weight_hh,
                        const Argument& feedback, bool transposed, const Argument& input_feedback, const Argument& pre,
                        const Argument& lengths, const std::vector<bool>& reverse, const std::string& nonlinearity,
                        const std::string& correction, const std::string& credit, const Numbers& target_step,
                        const Numbers& margin, const std::string& slope, const Numbers& slope_reg, const Numbers& scale,
                        const Numbers& input_scale, bool of_displacement, const Argument& grad_input,
                        const Argument& grad_weight_ih, const Argument& grad_weight_hh, const Argument& grad_bias,
                        const Argument& disp_h0, const Argument& credit_h0, const py::object& execution) {
  RnnCall call(op, states, lengths, reverse, execution);
  if (call.on_cuda())
    throw py::value_error(states.label() +
                          " must be on the CPU: on CUDA a pass that leaves delta and torch's products do this");
  const PassSettings settings{read_nonlinearity(call, nonlinearity),
                              read_correction(call, correction, kCorrections),
                              read_credit(call, credit),
                              read_slope(call, slope),
                              target_step,
                              margin,
                              slope_reg};
  const TargetPass pass{grad_states, disp_n,     credit_n, states,  &h0,       weight_hh,
                        feedback,    transposed, pre,      disp_h0, credit_h0, settings};
  pass.check(call);
  call.numbers(scale);
  call.numbers(input_scale);
  call.input(input);
  if (grad_input.given()) {
    call.floats(input_feedback, "SHI");
    call.floats(grad_input, "STBI");
  }
  check_parameters(call, grad_weight_ih, grad_weight_hh, grad_bias);
  call.run([&]<class T>(T) {
    return RnnLayerBackward<T>{.pass = pass.args<T>(call.sizes()),
                               .gradients = {.parameters = {.sizes = call.sizes(),
                                                            .scale = scale.as<T>(),
                                                            .delta = nullptr,
                                                            .states = states.data<const T>(),
                                                            .h0 = h0.data<const T>(),
                                                            .input = input_of<T>(input),
                                                            .grad_weight_ih = grad_weight_ih.data<T>(),
                                                            .grad_weight_hh = grad_weight_hh.data<T>(),
                                                            .grad_bias = grad_bias.data<T>(),
                                                            .grad_bias_hh = nullptr},
                                             .input_feedback = input_feedback.data<const T>(),
                                             .of_displacement = of_displacement,
                                             .input_scale = input_scale.as<T>(),
                                             .grad_input = grad_input.data<T>()}};
  });
}

// What a scan of these sizes runs as on a CUDA device: the regime, the bytes of zeroed workspace, predicted cycles.
py::tuple rnn_plan(const char* op, int products, const std::string& dtype, int64_t stack, int64_t batch, int64_t hidden,
                   int device, const std::string& regime) {
  require_cuda();
  if (products < 1 || products > 2)
    throw py::value_error(std::string(op) + ": products must be 1 or 2, got " + std::to_string(products));
  return planned(op, dtype, stack, batch, hidden, device, regime, [&]<class T>(T, cuda::Regime wanted) {
    // Within the template: outside, an unoptimised build would keep what is discarded and ask for its symbols.
    if constexpr (kWithCuda) return cuda::plan_rnn<T>(products, stack, batch, hidden, device, wanted);
    return cuda::RnnPlan{};
  });
}

}  // namespace

void define_rnn(py::module_& m) {
  define(m, "rnn_plan", rnn_plan, {"products", "dtype", "stack", "batch", "hidden", "device", "regime"});
  define(m, "rnn_layer_backward", rnn_layer_backward,
         {"grad_states",
          "disp_n",
          "credit_n",
          "input",
          "states",
          "h0",
          "weight_hh",
          "feedback",
          "transposed",
          "input_feedback",
          "pre",
          "lengths",
          "reverse",
          "nonlinearity",
          "correction",
          "credit",
          "target_step",
          "margin",
          "slope",
          "slope_reg",
          "scale",
          "input_scale",
          "of_displacement",
          "grad_input",
          "grad_weight_ih",
          "grad_weight_hh",
          "grad_bias",
          "disp_h0",
          "credit_h0",
          "execution"});
  define(m, "rnn_scan", rnn_scan,
         {"x_proj", "input", "weight_ih", "bias", "h0", "weight_hh", "lengths", "reverse", "nonlinearity", "states",
          "h_n", "execution"});
  define(m, "rnn_target_scan", rnn_target_scan,
         {"grad_states",
          "disp_n",
          "credit_n",
          "states",
          "h0",
          "weight_hh",
          "inverse",
          "x_proj",
          "lengths",
          "reverse",
          "nonlinearity",
          "correction",
          "credit",
          "target_step",
          "margin",
          "slope",
          "slope_reg",
          "delta",
          "disp_h0",
          "credit_h0",
          "norms",
          "displacement",
          "displacement_of_state",
          "execution"});
  define(m, "rnn_learned_target_scan", rnn_learned_target_scan,
         {"grad_states", "disp_n", "credit_n", "states", "weight_hh", "reverse_weight", "reverse_pre", "lengths",
          "reverse", "nonlinearity", "credit", "target_step", "delta", "disp_h0", "credit_h0", "norms",
          "displacement_of_state", "execution"});
  define(m, "rnn_weight_gradients", rnn_weight_gradients,
         {"delta", "states", "h0", "input", "lengths", "reverse", "scale", "grad_weight_ih", "grad_weight_hh",
          "grad_bias", "execution"});
}

}  // namespace tpext::bindings
