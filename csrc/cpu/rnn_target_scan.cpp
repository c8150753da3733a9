// The recurrent target pass, one sweep from the last step to the first (s = target_step, P = R', R the regularised
// inverse of W; equations of each correction with their sources in tpext/ops/rnn_target_scan.py):
//     d_{t-1} = -s g_{t-1} + z_t P,   z_t = d_t * D(h_t)                          linearized
//                                     z_t = a^-1(h_t + d_t) - a^-1(h_t)           difference
//     d_{t-1} = -s g_{t-1} + z_t P - h_{t-1},  z_t = a^-1(h_t + d_t) - x_proj_t   none
//     d_{t-1} = -s g_{t-1} + tanh(q_t + d_t V') - tanh(q_t)                       learned (P holds V')
//     e_t = (-d_t + [through_time] e_{t+1} W) * a'(h_t)
//
// Layouts stand in core/rnn.h, the split of the work in sweep.h and backward_sweep.h. A step is one product of the
// tile's rows (local credit) or two (through time), with all elementwise work in the epilogue: h and g are read once, e
// is written once. Memory: the packed matrices and two or three row tiles a thread. Deterministic, as sweep.h says.
#include "cpu/activations.h"
#include "cpu/backward_sweep.h"
#include "cpu/sweep.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

template <class T, Nonlinearity A, Correction C>
struct TargetStep {
  static constexpr bool displaces = true;
  const RnnTargetScan<T>& args;

  // What the inverse of step t + 1 adds to the displacement at t.
  Vec<T> propagated(const RowStep& at, int64_t column, int64_t count, Vec<T> displaced) const {
    if constexpr (C == Correction::learned)
      return tanh_difference<T>(load_part(args.reverse_pre + at.source + column, count), displaced);
    return displaced;
  }

  Stepped<T> operator()(const RowStep& at, int64_t column, int64_t count, Vec<T> displaced, Vec<T> credit) const {
    const Vec<T> h = load_part(args.states + at.current + column, count);
    Vec<T> d = load_part(args.grad_states + at.current + column, count) * -args.target_step;
    if (at.place != Place::last) {
      d += propagated(at, column, count, displaced);
      if constexpr (C == Correction::none) d -= h;
    }
    Vec<T> carried = d;
    if constexpr (C == Correction::linearized) carried = over_derivative<A, T>(d, h, T(1) - args.clip);
    if constexpr (C == Correction::difference) carried = inverse_difference<A, T>(h, d, T(1) - args.clip);
    if constexpr (C == Correction::none)
      carried = inverse_activate<A, T>(h + d, T(1) - args.clip) - load_part(args.x_proj + at.current + column, count);
    return {times_derivative<A, T>(credit - d, h), carried, d};
  }

  Vec<T> initial(const RowStep& at, int64_t column, int64_t count, Vec<T> displaced, Vec<T>) const {
    const Vec<T> d = propagated(at, column, count, displaced);
    if constexpr (C == Correction::none) return d - load_part(args.h0 + at.initial + column, count);
    return d;
  }

  // The displacement of the pre-activation as the layer below gets it: z, and for "none" the z of "difference".
  Vec<T> handed_down(const RowStep& at, int64_t column, int64_t count, const Stepped<T>& stepped) const {
    if constexpr (C == Correction::none) {
      if (at.place == Place::padding || at.place == Place::initial || at.place == Place::none) return Vec<T>{};
      const Vec<T> h = load_part(args.states + at.current + column, count);
      return inverse_difference<A, T>(h, stepped.displacement, T(1) - args.clip);
    }
    return stepped.carried;
  }
};

template <class T, Nonlinearity A>
void target_tile(const RnnTargetScan<T>& args, const Tile& tile, const PackedStack<T>& inverse,
                 const PackedStack<T>& weight, const BackwardOutputs<T>& outputs, T* scratch) {
  switch (args.correction) {
    case Correction::linearized:
      return backward_tile(args.sizes, tile, inverse, weight, TargetStep<T, A, Correction::linearized>{args}, outputs,
                           scratch);
    case Correction::difference:
      return backward_tile(args.sizes, tile, inverse, weight, TargetStep<T, A, Correction::difference>{args}, outputs,
                           scratch);
    case Correction::none:
      return backward_tile(args.sizes, tile, inverse, weight, TargetStep<T, A, Correction::none>{args}, outputs,
                           scratch);
    case Correction::learned:
      return backward_tile(args.sizes, tile, inverse, weight, TargetStep<T, A, Correction::learned>{args}, outputs,
                           scratch);
  }
}

template <class T>
void target_scan(const RnnTargetScan<T>& args, int max_threads) {
  const int threads = useful_threads(args.sizes, args.through_time ? 2 : 1, max_threads);
  PackedStack<T> inverse(args.inverse, true, args.sizes);
  PackedStack<T> weight(args.through_time ? args.weight_hh : nullptr, false, args.sizes);
  const int64_t per_thread = backward_scratch<T>(args.sizes, args.norms != nullptr);
  const Buffer<T> scratch(threads * per_thread);
  const BackwardOutputs<T> outputs{args.delta, args.disp_h0, args.norms, args.displacement};
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    inverse.pack();
    weight.pack();
    T* own = scratch.get() + thread_index() * per_thread;
    for_each_tile(args.sizes, thread_index(), thread_count(), [&](const Tile& tile) {
      switch (args.nonlinearity) {
        case Nonlinearity::tanh: return target_tile<T, Nonlinearity::tanh>(args, tile, inverse, weight, outputs, own);
        case Nonlinearity::relu: return target_tile<T, Nonlinearity::relu>(args, tile, inverse, weight, outputs, own);
        case Nonlinearity::identity:
          return target_tile<T, Nonlinearity::identity>(args, tile, inverse, weight, outputs, own);
      }
    });
  }
}

}  // namespace

void rnn_target_scan(const RnnTargetScan<float>& args, int threads) { target_scan(args, threads); }
void rnn_target_scan(const RnnTargetScan<double>& args, int threads) { target_scan(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
