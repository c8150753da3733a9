// The recurrent target pass, one sweep from the last step to the first (s = target_step, P = R', R the regularised
// inverse of W; equations of each correction with their sources in tpext/ops/rnn_target_scan.py):
//     d_{t-1} = -s g_{t-1} + z_t P,   z_t = d_t * slope(h_t)                      linearized
//                                     z_t = a^-1(h_t + d_t) - a^-1(h_t)           difference
//     d_{t-1} = -s g_{t-1} + z_t P - h_{t-1},  z_t = a^-1(h_t + d_t) - x_proj_t   none
//     d_{t-1} = -s g_{t-1} + tanh(q_t + d_t V') - tanh(q_t)                       learned (P holds V')
//     e_t = (-d_t + [through_time] e_{t+1} W) * a'(h_t)
// Back-propagation through time is linearized with P = W, s = 1 and a' for the slope: d is minus its gradient. By whole
// arrays (rnn_target_scan) or with all the gradients that e gives (rnn_layer_backward; layer_gradients.h).
//
// Layouts stand in core/rnn.h, the split of the work in sweep.h and backward_sweep.h. A step is one product of the
// tile's rows (local credit) or two (through time), with all elementwise work in the epilogue: h and g are read once, e
// is written once. Memory: the packed matrices and two row tiles a thread, four with norms. Deterministic, as sweep.h
// says.
#include "cpu/activations.h"
#include "cpu/layer_gradients.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// How z comes of d under correction linearized: the common choices cost nothing to make at compile time.
enum class Choice { published, derivative, given };

template <class T, Nonlinearity A, Correction C, Choice S = Choice::given>
struct TargetStep {
  static constexpr bool zero_stays_zero = C != Correction::none;
  static constexpr int kDelta = 1, kCarried = 1;
  static constexpr bool kDirect = false, kHandsDown = true;
  using Made = Stepped<T>;
  const RnnTargetScan<T>& args;
  T target_step = 0, bound = 0, slope_reg = 0;  // of one member: of()

  TargetStep of(int64_t member) const {
    TargetStep step{args, args.target_step.of(member)};
    if constexpr (C != Correction::learned) step.bound = T(1) - args.margin.of(member);
    if constexpr (C == Correction::linearized && S == Choice::given) step.slope_reg = args.slope_reg.of(member);
    return step;
  }

  Vec<T> times_slope(Vec<T> d, Vec<T> h) const {
    const Slope slope = S == Choice::given ? args.slope : S == Choice::derivative ? Slope::derivative : Slope::inverse;
    return VectorActivations<T>::times_slope(slope, A, d, h, bound, S == Choice::given ? slope_reg : T(0));
  }

  // What the inverse of step t + 1 adds to the displacement at t.
  Vec<T> propagated(const RowStep& at, int64_t column, int64_t count, Vec<T> displaced) const {
    if constexpr (C == Correction::learned)
      return tanh_difference<T>(load_part(args.reverse_pre + at.source + column, count), displaced);
    return displaced;
  }

  template <bool Last>
  Made at(const RowStep& at, int64_t column, int64_t count, const Incoming<T>& incoming) const {
    const Vec<T> h = load_part(args.states + at.current + column, count);
    Vec<T> d = {};
    if (args.grad_states != nullptr) d = load_part(args.grad_states + at.current + column, count) * -target_step;
    if constexpr (Last) {
      d += incoming.displaced;
    } else {
      d += propagated(at, column, count, incoming.displaced);
      if constexpr (C == Correction::none) d -= h;
    }
    Vec<T> carried = d;
    if constexpr (C == Correction::linearized) carried = times_slope(d, h);
    if constexpr (C == Correction::difference) carried = inverse_difference<A, T>(h, d, bound);
    if constexpr (C == Correction::none)
      carried = inverse_activate<A, T>(h + d, bound) - load_part(args.x_proj + at.current + column, count);
    return {{times_derivative<A, T>(incoming.credit - d, h)}, {carried}, d};
  }

  Incoming<T> initial(const RowStep& at, int64_t column, int64_t count, const Incoming<T>& incoming) const {
    Vec<T> d = propagated(at, column, count, incoming.displaced);
    if constexpr (C == Correction::none) d -= load_part(args.h0 + at.initial + column, count);
    return {d, incoming.credit};
  }

  // The displacement of the pre-activation as the layer below gets it: z, and for "none" the z of "difference".
  Vec<T> handed_down(const RowStep& at, int64_t column, int64_t count, const Made& stepped) const {
    if constexpr (C == Correction::none) {
      if (at.place == Place::padding || at.place == Place::initial || at.place == Place::none) return Vec<T>{};
      const Vec<T> h = load_part(args.states + at.current + column, count);
      return inverse_difference<A, T>(h, stepped.displacement, bound);
    }
    return stepped.carried[0];
  }
};

// Calls run(step) with the step of a pass.
template <class T, Nonlinearity A, class Run>
void with_correction(const RnnTargetScan<T>& args, const Run& run) {
  switch (args.correction) {
    case Correction::linearized:
      if (args.slope == Slope::inverse && args.slope_reg.all_zero())
        return run(TargetStep<T, A, Correction::linearized, Choice::published>{args});
      if (args.slope == Slope::derivative)
        return run(TargetStep<T, A, Correction::linearized, Choice::derivative>{args});
      return run(TargetStep<T, A, Correction::linearized>{args});
    case Correction::difference: return run(TargetStep<T, A, Correction::difference>{args});
    case Correction::none: return run(TargetStep<T, A, Correction::none>{args});
    case Correction::learned: return run(TargetStep<T, A, Correction::learned>{args});
  }
}

template <class T, class Run>
void with_step(const RnnTargetScan<T>& args, const Run& run) {
  switch (args.nonlinearity) {
    case Nonlinearity::tanh: return with_correction<T, Nonlinearity::tanh>(args, run);
    case Nonlinearity::relu: return with_correction<T, Nonlinearity::relu>(args, run);
    case Nonlinearity::identity: return with_correction<T, Nonlinearity::identity>(args, run);
  }
}

template <class T>
BackwardArrays<T> arrays_of(const RnnTargetScan<T>& args) {
  return {.states = args.states,
          .kept = nullptr,
          .kept_width = 0,
          .grad_states = args.grad_states,
          .beyond = {args.disp_n, args.through_time ? args.credit_n : nullptr, nullptr, nullptr},
          .initial = {args.disp_h0, args.through_time ? args.credit_h0 : nullptr, nullptr, nullptr},
          .norms = args.norms};
}

template <class T>
void target_scan(const RnnTargetScan<T>& args, int threads) {
  Backward<T> call(args.sizes, args.inverse, !args.is_feedback, args.through_time ? args.weight_hh : nullptr,
                   arrays_of(args));
  sweep_whole(call, args.delta, args.displacement, threads, [&](const auto& run) { with_step(args, run); });
}

template <class T>
void backward(const RnnLayerBackward<T>& args, int threads) {
  const RnnTargetScan<T>& pass = args.pass;
  Backward<T> call(pass.sizes, pass.inverse, !pass.is_feedback, pass.through_time ? pass.weight_hh : nullptr,
                   arrays_of(pass));
  layer_backward(args.gradients, call, threads, [&](const auto& run) { with_step(pass, run); });
}

}  // namespace

void rnn_target_scan(const RnnTargetScan<float>& args, int threads) { target_scan(args, threads); }
void rnn_target_scan(const RnnTargetScan<double>& args, int threads) { target_scan(args, threads); }
void rnn_layer_backward(const RnnLayerBackward<float>& args, int threads) { backward(args, threads); }
void rnn_layer_backward(const RnnLayerBackward<double>& args, int threads) { backward(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
