// The recurrent target pass, one sweep from the last step to the first (s = target_step, P = R', R the regularised
// inverse of W; equations of each correction with their sources in tpext/ops/rnn_target_scan.py):
//     d_{t-1} = -s g_{t-1} + z_t P,   z_t = d_t * slope(h_t)                      linearized
//                                     z_t = a^-1(h_t + d_t) - a^-1(h_t)           difference
//     d_{t-1} = -s g_{t-1} + z_t P - h_{t-1},  z_t = a^-1(h_t + d_t) - x_proj_t   none
//     d_{t-1} = -s g_{t-1} + tanh(q_t + d_t V') - tanh(q_t)                       learned (P holds V')
//     e_t = (-d_t + [through_time] e_{t+1} W) * a'(h_t)
//
// Layouts stand in core/rnn.h, the split of the work in sweep.h and backward_sweep.h. A step is one product of the
// tile's rows (local credit) or two (through time), with all elementwise work in the epilogue: h and g are read once, e
// is written once. Memory: the packed matrices and two row tiles a thread, four with norms. Deterministic, as sweep.h
// says.
#include "cpu/activations.h"
#include "cpu/backward_sweep.h"
#include "cpu/sweep.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Published: the slope is the plain inverse, which costs nothing to choose at compile time.
template <class T, Nonlinearity A, Correction C, bool Published = true>
struct TargetStep {
  static constexpr bool displaces = true, zero_stays_zero = C != Correction::none;
  const RnnTargetScan<T>& args;

  Vec<T> times_slope(Vec<T> d, Vec<T> h) const {
    if constexpr (Published) return over_derivative<A, T>(d, h, T(1) - args.margin);
    if (args.slope == Slope::one) return d;
    if (args.slope == Slope::derivative) return times_derivative<A, T>(d, h);
    return over_derivative<A, T>(d, h, T(1) - args.margin, args.slope_reg);
  }

  // What the inverse of step t + 1 adds to the displacement at t.
  Vec<T> propagated(const RowStep& at, int64_t column, int64_t count, Vec<T> displaced) const {
    if constexpr (C == Correction::learned)
      return tanh_difference<T>(load_part(args.reverse_pre + at.source + column, count), displaced);
    return displaced;
  }

  template <bool Last>
  Stepped<T> at(const RowStep& at, int64_t column, int64_t count, Vec<T> displaced, Vec<T> credit) const {
    const Vec<T> h = load_part(args.states + at.current + column, count);
    Vec<T> d = {};
    if (args.grad_states != nullptr) d = load_part(args.grad_states + at.current + column, count) * -args.target_step;
    if constexpr (Last) {
      d += displaced;
    } else {
      d += propagated(at, column, count, displaced);
      if constexpr (C == Correction::none) d -= h;
    }
    Vec<T> carried = d;
    if constexpr (C == Correction::linearized) carried = times_slope(d, h);
    if constexpr (C == Correction::difference) carried = inverse_difference<A, T>(h, d, T(1) - args.margin);
    if constexpr (C == Correction::none)
      carried = inverse_activate<A, T>(h + d, T(1) - args.margin) - load_part(args.x_proj + at.current + column, count);
    return {times_derivative<A, T>(credit - d, h), carried, d};
  }

  Vec<T> initial(const RowStep& at, int64_t column, int64_t count, Vec<T> displaced) const {
    const Vec<T> d = propagated(at, column, count, displaced);
    if constexpr (C == Correction::none) return d - load_part(args.h0 + at.initial + column, count);
    return d;
  }

  // The displacement of the pre-activation as the layer below gets it: z, and for "none" the z of "difference".
  Vec<T> handed_down(const RowStep& at, int64_t column, int64_t count, const Stepped<T>& stepped) const {
    if constexpr (C == Correction::none) {
      if (at.place == Place::padding || at.place == Place::initial || at.place == Place::none) return Vec<T>{};
      const Vec<T> h = load_part(args.states + at.current + column, count);
      return inverse_difference<A, T>(h, stepped.displacement, T(1) - args.margin);
    }
    return stepped.carried;
  }
};

template <class T, Nonlinearity A, class Tile>
void target_tile(const RnnTargetScan<T>& args, const Tile& tile) {
  switch (args.correction) {
    case Correction::linearized:
      if (args.slope == Slope::inverse && args.slope_reg == 0)
        return tile(TargetStep<T, A, Correction::linearized>{args});
      return tile(TargetStep<T, A, Correction::linearized, false>{args});
    case Correction::difference: return tile(TargetStep<T, A, Correction::difference>{args});
    case Correction::none: return tile(TargetStep<T, A, Correction::none>{args});
    case Correction::learned: return tile(TargetStep<T, A, Correction::learned>{args});
  }
}

template <class T>
void target_scan(const RnnTargetScan<T>& args, int max_threads) {
  const BackwardArrays<T> arrays{.states = args.states,
                                 .grad_states = args.grad_states,
                                 .disp_n = args.disp_n,
                                 .credit_n = args.through_time ? args.credit_n : nullptr,
                                 .delta = args.delta,
                                 .disp_h0 = args.disp_h0,
                                 .credit_h0 = args.through_time ? args.credit_h0 : nullptr,
                                 .norms = args.norms,
                                 .displacement = args.displacement};
  BackwardSweep<T> sweep(args.sizes, args.inverse, args.through_time ? args.weight_hh : nullptr, arrays, max_threads);
  sweep.run([&](const auto& tile) {
    switch (args.nonlinearity) {
      case Nonlinearity::tanh: return target_tile<T, Nonlinearity::tanh>(args, tile);
      case Nonlinearity::relu: return target_tile<T, Nonlinearity::relu>(args, tile);
      case Nonlinearity::identity: return target_tile<T, Nonlinearity::identity>(args, tile);
    }
  });
}

}  // namespace

void rnn_target_scan(const RnnTargetScan<float>& args, int threads) { target_scan(args, threads); }
void rnn_target_scan(const RnnTargetScan<double>& args, int threads) { target_scan(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
