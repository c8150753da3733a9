// The entries of `_C` for gated recurrent layers.
#include "core/gated.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/entries.h"
#include "bindings/rnn_call.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

namespace {

Cell read_cell(const char* op, const std::string& name) {
  return static_cast<Cell>(choose(op, "cell", name, {"gru", "lstm"}));
}

enum class Backend { cpu, cuda };

// A call whose leading argument is [S, T, B, H], of a cell; it knows the sizes G H ('G') and K ('K').
class GatedCall : public RnnCall {
 public:
  GatedCall(const char* op, const Argument& leading, const Argument& lengths, const std::vector<bool>& reverse,
            const std::string& cell, const py::object& execution, Backend backend)
      : RnnCall(op, leading, lengths, reverse, execution), cell_(read_cell(op, cell)) {
    if (on_cuda() && backend == Backend::cpu)
      throw py::value_error(leading.label() + " must be on the CPU: on CUDA scans and torch's products do this");
    if (!on_cuda() && backend == Backend::cuda)
      throw py::value_error(leading.label() + " must be on a CUDA device: on the CPU another entry does this");
    set('G', gate_count(cell_) * size('H'));
    set('K', kept_count(cell_));
  }

  Cell cell() const { return cell_; }
  // An argument that belongs to the LSTM alone.
  void of_cell(const Argument& argument, const char* dims) {
    if (cell_ == Cell::lstm) return floats(argument, dims);
    if (argument.given()) throw py::value_error(argument.label() + " must be None for cell 'gru', got a tensor");
  }

 private:
  const Cell cell_;
};

void gated_scan(const char* op, const Argument& input, const Argument& h0, const Argument& c0,
                const Argument& weight_ih, const Argument& weight_hh, const Argument& bias_ih, const Argument& bias_hh,
                const Argument& lengths, const std::vector<bool>& reverse, const std::string& cell,
                const Argument& states, const Argument& h_n, const Argument& c_n, const Argument& kept,
                const py::object& execution) {
  GatedCall call(op, states, lengths, reverse, cell, execution, Backend::cpu);
  call.input(input);
  call.floats(h0, "SBH");
  call.of_cell(c0, "SBH");
  call.floats(weight_ih, "SGI");
  call.floats(weight_hh, "SGH");
  if (bias_ih.given() || bias_hh.given()) {
    call.floats(bias_ih, "SG");
    call.floats(bias_hh, "SG");
  }
  call.written(states, "STBH");
  call.floats(h_n, "SBH");
  call.of_cell(c_n, "SBH");
  if (kept.given()) call.written(kept, "STBKH");
  call.run([&]<class T>(T) {
    return GatedScan<T>{.sizes = call.sizes(),
                        .cell = call.cell(),
                        .input = input_of<T>(input),
                        .weight_ih = weight_ih.data<const T>(),
                        .weight_hh = weight_hh.data<const T>(),
                        .bias_ih = bias_ih.data<const T>(),
                        .bias_hh = bias_hh.data<const T>(),
                        .h0 = h0.data<const T>(),
                        .c0 = c0.data<const T>(),
                        .states = states.data<T>(),
                        .h_n = h_n.data<T>(),
                        .c_n = c_n.data<T>(),
                        .kept = kept.data<T>()};
  });
}

void gated_layer_backward(const char* op, const Argument& grad_states, const Argument& input, const Argument& states,
                          const Argument& h0, const Argument& c0, const Argument& kept, const Argument& weight_hh,
                          const Argument& feedback, const Argument& input_feedback, const Argument& lengths,
                          const std::vector<bool>& reverse, const std::string& cell, const std::string& inverse,
                          const std::string& credit, const Numbers& target_step, const Numbers& margin,
                          const std::string& gate_slope, const std::string& candidate_slope, const Numbers& slope_reg,
                          const Numbers& scale, const Numbers& input_scale, const Argument& disp_h_n,
                          const Argument& disp_c_n, const Argument& credit_h_n, const Argument& credit_c_n,
                          const Argument& grad_input, const Argument& grad_weight_ih, const Argument& grad_weight_hh,
                          const Argument& grad_bias_ih, const Argument& grad_bias_hh, const Argument& disp_h0,
                          const Argument& disp_c0, const Argument& credit_h0, const Argument& credit_c0,
                          const py::object& execution) {
  GatedCall call(op, states, lengths, reverse, cell, execution, Backend::cpu);
  const auto way = static_cast<CellInverse>(choose(op, "inverse", inverse, {"branch", "cell"}));
  const bool through_time = read_credit(call, credit);
  const Slope of_gates = read_slope(call, gate_slope, "gate_slope"),
              of_candidate = read_slope(call, candidate_slope, "candidate_slope");
  for (const Numbers* numbers : {&target_step, &margin, &slope_reg, &scale, &input_scale}) call.numbers(*numbers);
  call.optional(grad_states, "STBH");
  call.input(input);
  call.floats(h0, "SBH");
  call.of_cell(c0, "SBH");
  call.floats(kept, "STBKH");
  call.floats(weight_hh, "SGH");
  call.floats(feedback, "SGH");
  for (const Argument* states_of_h : {&disp_h_n, &credit_h_n, &credit_h0}) call.optional(*states_of_h, "SBH");
  call.floats(disp_h0, "SBH");
  for (const Argument* states_of_c : {&disp_c_n, &credit_c_n, &disp_c0, &credit_c0})
    if (states_of_c->given()) call.of_cell(*states_of_c, "SBH");
  if (grad_input.given()) {
    call.floats(input_feedback, "SGI");
    call.floats(grad_input, "STBI");
  }
  call.optional(grad_weight_ih, "SGI");
  call.optional(grad_weight_hh, "SGH");
  call.optional(grad_bias_ih, "SG");
  call.optional(grad_bias_hh, "SG");
  call.run([&]<class T>(T) {
    return GatedLayerBackward<T>{
        .sizes = call.sizes(),
        .cell = call.cell(),
        .inverse = way,
        .through_time = through_time,
        .gate_slope = of_gates,
        .candidate_slope = of_candidate,
        .target_step = target_step.as<T>(),
        .margin = margin.as<T>(),
        .slope_reg = slope_reg.as<T>(),
        .grad_states = grad_states.data<const T>(),
        .beyond = {disp_h_n.data<const T>(), disp_c_n.data<const T>(), credit_h_n.data<const T>(),
                   credit_c_n.data<const T>()},
        .states = states.data<const T>(),
        .kept = kept.data<const T>(),
        .h0 = h0.data<const T>(),
        .c0 = c0.data<const T>(),
        .weight_hh = weight_hh.data<const T>(),
        .feedback = feedback.data<const T>(),
        .initial = {disp_h0.data<T>(), disp_c0.data<T>(), credit_h0.data<T>(), credit_c0.data<T>()},
        .gradients = {.parameters = {.sizes = call.sizes(),
                                     .scale = scale.as<T>(),
                                     .delta = nullptr,
                                     .states = states.data<const T>(),
                                     .h0 = h0.data<const T>(),
                                     .input = input_of<T>(input),
                                     .grad_weight_ih = grad_weight_ih.data<T>(),
                                     .grad_weight_hh = grad_weight_hh.data<T>(),
                                     .grad_bias = grad_bias_ih.data<T>(),
                                     .grad_bias_hh = grad_bias_hh.data<T>(),
                                     .blocks = delta_blocks(call.cell())},
                      .input_feedback = input_feedback.data<const T>(),
                      .of_displacement = false,
                      .input_scale = input_scale.as<T>(),
                      .grad_input = grad_input.data<T>()}};
  });
}

void gated_projected_scan(const char* op, const Argument& x_proj, const Argument& bias_n, const Argument& h0,
                          const Argument& c0, const Argument& weight_hh, const Argument& lengths,
                          const std::vector<bool>& reverse, const std::string& cell, const Argument& states,
                          const Argument& h_n, const Argument& c_n, const Argument& kept, const py::object& execution) {
  GatedCall call(op, states, lengths, reverse, cell, execution, Backend::cuda);
  call.floats(x_proj, "STBG");
  call.optional(bias_n, "SH");
  call.floats(h0, "SBH");
  call.of_cell(c0, "SBH");
  call.floats(weight_hh, "SGH");
  call.written(states, "STBH");
  call.floats(h_n, "SBH");
  call.of_cell(c_n, "SBH");
  if (kept.given()) call.written(kept, "STBKH");
  call.run_scan_on_cuda(
      {1, 1, gate_count(call.cell())},
      [&]<class T>(T) {
        GatedScan<T> args{};
        args.sizes = call.sizes();
        args.cell = call.cell();
        args.weight_hh = weight_hh.data<const T>();
        args.h0 = h0.data<const T>();
        args.c0 = c0.data<const T>();
        args.states = states.data<T>();
        args.h_n = h_n.data<T>();
        args.c_n = c_n.data<T>();
        args.kept = kept.data<T>();
        return args;
      },
      [&]<class T>(const GatedScan<T>& args, const auto& where) {
        cuda::gated_scan(args, x_proj.data<const T>(), bias_n.data<const T>(), where);
      });
}

void gated_target_scan(const char* op, const Argument& grad_states, const Argument& states, const Argument& h0,
                       const Argument& c0, const Argument& kept, const Argument& weight_hh, const Argument& feedback,
                       const Argument& lengths, const std::vector<bool>& reverse, const std::string& cell,
                       const std::string& inverse, const std::string& credit, const Numbers& target_step,
                       const Numbers& margin, const std::string& gate_slope, const std::string& candidate_slope,
                       const Numbers& slope_reg, const Argument& disp_h_n, const Argument& disp_c_n,
                       const Argument& credit_h_n, const Argument& credit_c_n, const Argument& delta,
                       const Argument& disp_h0, const Argument& disp_c0, const Argument& credit_h0,
                       const Argument& credit_c0, const py::object& execution) {
  GatedCall call(op, states, lengths, reverse, cell, execution, Backend::cuda);
  const auto way = static_cast<CellInverse>(choose(op, "inverse", inverse, {"branch", "cell"}));
  const bool through_time = read_credit(call, credit);
  const Slope of_gates = read_slope(call, gate_slope, "gate_slope"),
              of_candidate = read_slope(call, candidate_slope, "candidate_slope");
  for (const Numbers* numbers : {&target_step, &margin, &slope_reg}) call.numbers(*numbers);
  call.optional(grad_states, "STBH");
  call.floats(h0, "SBH");
  call.of_cell(c0, "SBH");
  call.floats(kept, "STBKH");
  call.floats(weight_hh, "SGH");
  call.floats(feedback, "SGH");
  for (const Argument* of_h : {&disp_h_n, &credit_h_n}) call.optional(*of_h, "SBH");
  for (const Argument* of_c : {&disp_c_n, &credit_c_n})
    if (of_c->given()) call.of_cell(*of_c, "SBH");
  call.set('D', delta_blocks(call.cell()).count);
  call.written(delta, "STBDH");
  call.floats(disp_h0, "SBH");
  call.of_cell(disp_c0, "SBH");
  if (through_time) {
    call.floats(credit_h0, "SBH");
    call.of_cell(credit_c0, "SBH");
  }
  call.run_scan_on_cuda(
      {through_time ? 2 : 1, gate_count(call.cell()), 1},
      [&]<class T>(T) {
        GatedLayerBackward<T> args{};
        args.sizes = call.sizes();
        args.cell = call.cell();
        args.inverse = way;
        args.through_time = through_time;
        args.gate_slope = of_gates;
        args.candidate_slope = of_candidate;
        args.target_step = target_step.as<Compute<T>>();
        args.margin = margin.as<Compute<T>>();
        args.slope_reg = slope_reg.as<Compute<T>>();
        args.grad_states = grad_states.data<const T>();
        args.beyond = {disp_h_n.data<const T>(), disp_c_n.data<const T>(), credit_h_n.data<const T>(),
                       credit_c_n.data<const T>()};
        args.states = states.data<const T>();
        args.kept = kept.data<const T>();
        args.h0 = h0.data<const T>();
        args.c0 = c0.data<const T>();
        args.weight_hh = weight_hh.data<const T>();
        args.feedback = feedback.data<const T>();
        args.initial = {disp_h0.data<T>(), disp_c0.data<T>(), credit_h0.data<T>(), credit_c0.data<T>()};
        return args;
      },
      [&]<class T>(const GatedLayerBackward<T>& args, const auto& where) {
        cuda::gated_target_scan(args, delta.data<T>(), where);
      });
}

py::tuple gated_plan(const char* op, const std::string& cell, const std::string& way, const std::string& dtype,
                     int64_t stack, int64_t batch, int64_t hidden, int device, const std::string& regime) {
  require_cuda();
  const Cell of = read_cell(op, cell);
  const auto pass = choose(op, "way", way, {"forward", "local", "through_time"});
  return planned(op, dtype, stack, batch, hidden, device, regime, [&]<class T>(T, cuda::Regime wanted) {
    if constexpr (kWithCuda) {
      if (pass == 0) return cuda::plan_gated_scan<T>(of, stack, batch, hidden, device, wanted);
      return cuda::plan_gated_target_scan<T>(of, pass == 2, stack, batch, hidden, device, wanted);
    }
    return cuda::RnnPlan{};
  });
}

}  // namespace

void define_gated(py::module_& m) {
  define(m, "gated_plan", gated_plan, {"cell", "way", "dtype", "stack", "batch", "hidden", "device", "regime"});
  define(m, "gated_projected_scan", gated_projected_scan,
         {"x_proj", "bias_n", "h0", "c0", "weight_hh", "lengths", "reverse", "cell", "states", "h_n", "c_n", "kept",
          "execution"});
  define(m, "gated_target_scan", gated_target_scan,
         {"grad_states", "states",          "h0",        "c0",        "kept",      "weight_hh",   "feedback",
          "lengths",     "reverse",         "cell",      "inverse",   "credit",    "target_step", "margin",
          "gate_slope",  "candidate_slope", "slope_reg", "disp_h_n",  "disp_c_n",  "credit_h_n",  "credit_c_n",
          "delta",       "disp_h0",         "disp_c0",   "credit_h0", "credit_c0", "execution"});
  define(m, "gated_layer_backward", gated_layer_backward,
         {"grad_states",
          "input",
          "states",
          "h0",
          "c0",
          "kept",
          "weight_hh",
          "feedback",
          "input_feedback",
          "lengths",
          "reverse",
          "cell",
          "inverse",
          "credit",
          "target_step",
          "margin",
          "gate_slope",
          "candidate_slope",
          "slope_reg",
          "scale",
          "input_scale",
          "disp_h_n",
          "disp_c_n",
          "credit_h_n",
          "credit_c_n",
          "grad_input",
          "grad_weight_ih",
          "grad_weight_hh",
          "grad_bias_ih",
          "grad_bias_hh",
          "disp_h0",
          "disp_c0",
          "credit_h0",
          "credit_c0",
          "execution"});
  define(m, "gated_scan", gated_scan,
         {"input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "lengths", "reverse", "cell", "states",
          "h_n", "c_n", "kept", "execution"});
}

}  // namespace tpext::bindings
