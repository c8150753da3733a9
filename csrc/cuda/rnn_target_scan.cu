// The recurrent target pass, and back-propagation through time as the same sweep (s = target_step, P = R', R the
// regularised inverse of W; equations of each correction with their sources in tpext/ops/rnn_target_scan.py):
//     d_{t-1} = -s g_{t-1} + z_t P,   z_t = d_t * D(h_t)                          linearized
//                                     z_t = a^-1(h_t + d_t) - a^-1(h_t)           difference
//     d_{t-1} = -s g_{t-1} + z_t P - h_{t-1},  z_t = a^-1(h_t + d_t) - x_proj_t   none
//     d_{t-1} = -s g_{t-1} + tanh(q_t + d_t V') - tanh(q_t)                       learned (P holds V')
//     e_t = (-d_t + [through_time] e_{t+1} W) * a'(h_t)
//     e_t = (g_t + e_{t+1} W) * a'(h_t)                                           back-propagation
//
// Layouts stand in core/rnn.h, work split, memory and determinism in sweep.h. The states of the sweep are z (one
// product), e (back-propagation) or both (through time). A step reads h and g (and x_proj or q) once and writes e once:
// 3 to 4 B H elements a member; 2 B H^2 operations, 4 through time. Predicted on an H200 (1.8 GHz): H = 100 and one row
// a block 250 + 104 cycles a step, 0.2 us, through time 250 + 208, 0.25 us; H = 128 and four rows 0.42 and 0.71 us;
// H = 512 in clusters, four rows: 0.93 us, through time in clusters of 16 the same work a block.
#include "cuda/activations.h"
#include "cuda/backward_sweep.h"
#include "cuda/plan.h"

namespace tpext::cuda {
namespace {

template <class T, int kStepProducts>
struct BackwardStep {
  using Storage = T;
  using C = Compute<T>;
  static constexpr int kProducts = kStepProducts;
  static constexpr bool kBackward = true;
  struct Loads {
    T h, g, extra;
  };
  struct Result {
    C carried[kProducts];  // through time: z, e
    C delta, displacement, handed_down;
  };

  BackwardArrays<T> arrays;

  BackwardStep from_member(int64_t first, const RnnSizes& sizes) const {
    const int64_t initial = first * sizes.batch * sizes.hidden, all = initial * sizes.time;
    BackwardStep part = *this;
    const auto move = [](auto*& pointer, int64_t by) {
      if (pointer != nullptr) pointer += by;
    };
    move(part.arrays.weight_hh, first * sizes.hidden * sizes.hidden);
    move(part.arrays.inverse, first * sizes.hidden * sizes.hidden);
    move(part.arrays.grad_states, all);
    move(part.arrays.disp_n, initial);
    move(part.arrays.credit_n, initial);
    move(part.arrays.states, all);
    move(part.arrays.h0, initial);
    move(part.arrays.extra, all);
    move(part.arrays.delta, all);
    move(part.arrays.disp_h0, initial);
    move(part.arrays.credit_h0, initial);
    move(part.arrays.displacement, all);
    move(part.arrays.displacement_of_state, all);
    return part;
  }

  // Product 0 of a target pass takes the inverse, transposed; every other product takes W.
  __device__ T weight(int p, int member, int H, int k, int n) const {
    const int64_t base = static_cast<int64_t>(member) * H * H;
    return arrays.displaces && p == 0 ? arrays.inverse[base + static_cast<int64_t>(n) * H + k]
                                      : arrays.weight_hh[base + static_cast<int64_t>(k) * H + n];
  }
  __device__ T first_state(int64_t) const { return T{}; }

  // `next`: from an element to that of the next step of the sweep.
  __device__ void load(Loads& loads, int64_t element, int64_t next, bool begins) const {
    loads.h = arrays.states[element];
    loads.g = arrays.grad_states == nullptr ? T{} : arrays.grad_states[element];
    // The reverse layer's pre-activation is that of the step which the sweep comes from.
    const bool learned = arrays.correction == Correction::learned;
    loads.extra =
        arrays.extra == nullptr || (learned && begins) ? T{} : arrays.extra[learned ? element - next : element];
  }

  __device__ C beyond(const T* array, const Position& at) const {
    return array == nullptr ? C(0) : to_compute(array[at.initial]);
  }

  __device__ Result advance(const Loads& loads, const Position& at, const C (&y)[kProducts]) const {
    const Nonlinearity a = arrays.nonlinearity;
    const C h = to_compute(loads.h), g = to_compute(loads.g);
    Result result = {};
    C credit = C(0), d = C(0);
    if (kProducts == 2 || !arrays.displaces) credit = at.first ? beyond(arrays.credit_n, at) : y[kProducts - 1];
    if (!arrays.displaces) {
      result.delta = times_derivative(a, credit + g, h);
      result.carried[0] = result.delta;
      return result;
    }
    const C bound = C(1) - arrays.clip, extra = to_compute(loads.extra);
    C displaced = y[0];
    if (arrays.correction == Correction::learned) displaced = tanh_difference(extra, displaced);
    if (arrays.correction == Correction::none) displaced -= h;
    if (at.first) displaced = beyond(arrays.disp_n, at);
    d = displaced - arrays.target_step * g;
    C z = d;
    if (arrays.correction == Correction::linearized) z = over_derivative(a, d, h, bound);
    if (arrays.correction == Correction::difference) z = inverse_difference(a, h, d, bound);
    result.handed_down = z;
    if (arrays.correction == Correction::none) {
      z = inverse_activate(a, h + d, bound) - extra;
      if (arrays.displacement != nullptr) result.handed_down = inverse_difference(a, h, d, bound);
    }
    result.displacement = d;
    result.delta = times_derivative(a, credit - d, h);
    result.carried[0] = z;
    if constexpr (kProducts == 2) result.carried[1] = result.delta;
    return result;
  }

  __device__ void store(const Result& result, const Position& at) const {
    const auto write = [&](T* array, C value) { array[at.element] = from_compute<T>(at.valid ? value : C(0)); };
    write(arrays.delta, result.delta);
    if (arrays.displacement != nullptr) write(arrays.displacement, result.handed_down);
    if (arrays.displacement_of_state != nullptr) write(arrays.displacement_of_state, result.displacement);
  }

  // `at.valid`: the row has a step; `at.element`: that of its first.
  __device__ void finish(const Position& at, const C (&y)[kProducts], T) const {
    if (arrays.credit_h0 != nullptr)
      arrays.credit_h0[at.initial] = from_compute<T>(at.valid ? y[kProducts - 1] : beyond(arrays.credit_n, at));
    if (arrays.disp_h0 == nullptr) return;
    C d = y[0];
    if (!at.valid) d = beyond(arrays.disp_n, at);
    if (at.valid && arrays.correction == Correction::learned)
      d = tanh_difference(to_compute(arrays.extra[at.element]), d);
    if (at.valid && arrays.correction == Correction::none) d -= to_compute(arrays.h0[at.initial]);
    arrays.disp_h0[at.initial] = from_compute<T>(d);
  }
};

template <class T, int kProducts>
RnnPlan plan_of(const RnnSizes& sizes, int device, Regime wanted) {
  const auto choice = choose_sweep<BackwardStep<T, kProducts>>(sizes, device, wanted);
  return {choice.regime, choice.workspace_bytes, choice.cycles};
}

}  // namespace

template <class T>
RnnPlan plan_backward_sweep(int products, const RnnSizes& sizes, int device, Regime wanted) {
  return products == 1 ? plan_of<T, 1>(sizes, device, wanted) : plan_of<T, 2>(sizes, device, wanted);
}

template <class T>
void run_backward_sweep(int products, const BackwardArrays<T>& arrays, const RnnSizes& sizes,
                        const RnnExecution& execution) {
  if (products == 1) {
    run_sweep(sizes, execution, BackwardStep<T, 1>{arrays});
  } else {
    run_sweep(sizes, execution, BackwardStep<T, 2>{arrays});
  }
}

template <class T>
void rnn_target_scan(const RnnTargetScan<T>& args, T* displacement_of_state, const RnnExecution& execution) {
  const bool learned = args.correction == Correction::learned;
  const BackwardArrays<T> arrays{.nonlinearity = args.nonlinearity,
                                 .displaces = true,
                                 .correction = args.correction,
                                 .target_step = args.target_step,
                                 .clip = args.clip,
                                 .weight_hh = args.through_time ? args.weight_hh : nullptr,
                                 .inverse = args.inverse,
                                 .grad_states = args.grad_states,
                                 .disp_n = args.disp_n,
                                 .credit_n = args.through_time ? args.credit_n : nullptr,
                                 .states = args.states,
                                 .h0 = args.h0,
                                 .extra = learned                               ? args.reverse_pre
                                          : args.correction == Correction::none ? args.x_proj
                                                                                : nullptr,
                                 .delta = args.delta,
                                 .disp_h0 = args.disp_h0,
                                 .credit_h0 = args.through_time ? args.credit_h0 : nullptr,
                                 .displacement = args.displacement,
                                 .displacement_of_state = displacement_of_state};
  run_backward_sweep(args.through_time ? 2 : 1, arrays, args.sizes, execution);
}

#define TPEXT_INSTANTIATE(T)                                                                                \
  template RnnPlan plan_backward_sweep<T>(int, const RnnSizes&, int, Regime);                               \
  template void run_backward_sweep<T>(int, const BackwardArrays<T>&, const RnnSizes&, const RnnExecution&); \
  template void rnn_target_scan<T>(const RnnTargetScan<T>&, T*, const RnnExecution&);
TPEXT_INSTANTIATE(float)
TPEXT_INSTANTIATE(double)
TPEXT_INSTANTIATE(Bfloat16)
TPEXT_INSTANTIATE(Float16)

}  // namespace tpext::cuda
