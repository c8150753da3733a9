// The recurrent target pass (s = target_step, P = R', R the regularised inverse of W; equations of each correction with
// their sources in tpext/ops/rnn_target_scan.py):
//     d_{t-1} = -s g_{t-1} + z_t P,   z_t = d_t * slope(h_t)                      linearized
//                                     z_t = a^-1(h_t + d_t) - a^-1(h_t)           difference
//     d_{t-1} = -s g_{t-1} + z_t P - h_{t-1},  z_t = a^-1(h_t + d_t) - x_proj_t   none
//     d_{t-1} = -s g_{t-1} + tanh(q_t + d_t V') - tanh(q_t)                       learned (P holds V')
//     e_t = (-d_t + [through_time] e_{t+1} W) * a'(h_t)
// Back-propagation through time is linearized with P = W, s = 1 and a' for the slope: d is minus its gradient.
//
// Layouts stand in core/rnn.h, work split, memory and determinism in sweep.h. The states of the sweep are z (one
// product) or z and e (through time). A step reads h and g (and x_proj or q) once and writes e once:
// 3 to 4 B H elements a member; 2 B H^2 operations, 4 through time. Predicted by plan.h for an H200 at 1.8 GHz, not
// measured: H = 100 and one row a block 500 cycles a step, 0.28 us, through time 610, 0.34 us; H = 128 and four rows
// 910 and 1420, 0.51 and 0.79 us; H = 512, batch 64, in clusters of 8 and of 16, 2400 and 3400, 1.3 and 1.9 us.
#include "cuda/activations.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace tpext::cuda {
namespace {

// What the pass reads and writes, as core/rnn.h has it; any pointer may be null but states, delta and the matrix of
// each product.
template <class T>
struct BackwardArrays {
  Nonlinearity nonlinearity;
  Correction correction;
  Slope slope;
  Compute<T> target_step, margin, slope_reg;
  const T* weight_hh;        // product e W: credit through time
  const T* inverse;          // product z P, P = inverse'
  const T* grad_states;      // [S, T, B, H]
  const T* disp_n;           // [S, B, H]
  const T* credit_n;         // [S, B, H]
  const T* states;           // [S, T, B, H]
  const T* h0;               // [S, B, H], correction none
  const T* extra;            // [S, T, B, H]: x_proj for correction none, reverse_pre for learned
  T* delta;                  // [S, T, B, H]
  T* disp_h0;                // [S, B, H]
  T* credit_h0;              // [S, B, H]
  T* displacement;           // [S, T, B, H] z_t, for "none" the z_t of "difference"
  T* displacement_of_state;  // [S, T, B, H] d_t
};

template <class T, bool kThroughTime>
struct BackwardStep {
  using Storage = T;
  using C = Compute<T>;
  using Act = ScalarActivations<C>;
  using Products = Fan<kThroughTime ? 2 : 1, 1, 1>;
  static constexpr int kOwn = 0;
  static constexpr bool kBackward = true;
  static constexpr int ahead(int rows) { return rows == 1 ? 4 : 2; }
  struct Loads {
    T h, g, extra;
  };
  // What comes from beyond the row's last valid step.
  struct Start {
    C displacement, credit;
  };
  struct Result {
    C carried[Products::kStates];  // through time: z, e
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

  // Product 0 takes the inverse, transposed; the other takes W.
  __device__ Matrix<T> matrix(int p) const {
    return p == 0 ? Matrix<T>{arrays.inverse, true} : Matrix<T>{arrays.weight_hh, false};
  }
  __device__ T first_state(int64_t) const { return T{}; }

  __device__ void load(Loads& loads, const Place& at) const {
    loads.h = arrays.states[at.element];
    loads.g = arrays.grad_states == nullptr ? T{} : arrays.grad_states[at.element];
    // The reverse layer's pre-activation is that of the step which the sweep comes from.
    const bool learned = arrays.correction == Correction::learned;
    loads.extra = arrays.extra == nullptr || (learned && at.begins)
                      ? T{}
                      : arrays.extra[learned ? at.element - at.next : at.element];
  }

  __device__ Start start(int64_t initial) const {
    const auto read = [&](const T* array) { return array == nullptr ? C(0) : to_compute(array[initial]); };
    return {read(arrays.disp_n), kThroughTime ? read(arrays.credit_n) : C(0)};
  }

  __device__ Result advance(const Loads& loads, const Start& start, const Position& at,
                            const Arriving<BackwardStep>& y) const {
    const Nonlinearity a = arrays.nonlinearity;
    const C h = to_compute(loads.h), g = to_compute(loads.g);
    Result result = {};
    C credit = C(0);
    if constexpr (kThroughTime) credit = at.first ? start.credit : y.sums[1];
    const C bound = C(1) - arrays.margin, extra = to_compute(loads.extra);
    C displaced = y.sums[0];
    if (arrays.correction == Correction::learned) displaced = Act::tanh_difference(extra, displaced);
    if (arrays.correction == Correction::none) displaced -= h;
    if (at.first) displaced = start.displacement;
    const C d = displaced - arrays.target_step * g;
    C z = d;
    if (arrays.correction == Correction::linearized)
      z = Act::times_slope(arrays.slope, a, d, h, bound, arrays.slope_reg);
    if (arrays.correction == Correction::difference) z = Act::inverse_difference(a, h, d, bound);
    result.handed_down = z;
    if (arrays.correction == Correction::none) {
      z = Act::inverse_activate(a, h + d, bound) - extra;
      if (arrays.displacement != nullptr) result.handed_down = Act::inverse_difference(a, h, d, bound);
    }
    result.displacement = d;
    result.delta = Act::times_derivative(a, credit - d, h);
    result.carried[0] = z;
    if constexpr (kThroughTime) result.carried[1] = result.delta;
    return result;
  }

  __device__ void store(const Result& result, const Position& at) const {
    const auto write = [&](T* array, C value) { array[at.element] = from_compute<T>(at.valid ? value : C(0)); };
    write(arrays.delta, result.delta);
    if (arrays.displacement != nullptr) write(arrays.displacement, result.handed_down);
    if (arrays.displacement_of_state != nullptr) write(arrays.displacement_of_state, result.displacement);
  }

  // `at.valid`: the row has a step; `at.element`: that of its first.
  __device__ void finish(const Position& at, const Arriving<BackwardStep>& y, T) const {
    const Start start = at.valid ? Start{} : this->start(at.initial);
    if (arrays.credit_h0 != nullptr)
      arrays.credit_h0[at.initial] = from_compute<T>(at.valid ? y.sums[Products::kSums - 1] : start.credit);
    C d = at.valid ? y.sums[0] : start.displacement;
    if (at.valid && arrays.correction == Correction::learned)
      d = Act::tanh_difference(to_compute(arrays.extra[at.element]), d);
    if (at.valid && arrays.correction == Correction::none) d -= to_compute(arrays.h0[at.initial]);
    arrays.disp_h0[at.initial] = from_compute<T>(d);
  }
};

template <class T, bool kThroughTime>
RnnPlan plan_of(const RnnSizes& sizes, int device, Regime wanted) {
  const auto choice = choose_sweep<BackwardStep<T, kThroughTime>>(sizes, device, wanted);
  return {choice.regime, choice.workspace_bytes, choice.cycles};
}

}  // namespace

template <class T>
RnnPlan plan_rnn(int products, int64_t stack, int64_t batch, int64_t hidden, int device, Regime wanted) {
  const RnnSizes sizes{stack, 0, batch, hidden, nullptr, nullptr};
  return products == 2 ? plan_of<T, true>(sizes, device, wanted) : plan_of<T, false>(sizes, device, wanted);
}

template <class T>
void rnn_target_scan(const RnnTargetScan<T>& args, T* displacement_of_state, const RnnExecution& execution) {
  const bool learned = args.correction == Correction::learned;
  const BackwardArrays<T> arrays{.nonlinearity = args.nonlinearity,
                                 .correction = args.correction,
                                 .slope = args.slope,
                                 .target_step = args.target_step.of(0),
                                 .margin = args.margin.of(0),
                                 .slope_reg = args.slope_reg.of(0),
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
  if (args.through_time) return run_sweep(args.sizes, execution, BackwardStep<T, true>{arrays});
  run_sweep(args.sizes, execution, BackwardStep<T, false>{arrays});
}

#define TPEXT_INSTANTIATE(T)                                                 \
  template RnnPlan plan_rnn<T>(int, int64_t, int64_t, int64_t, int, Regime); \
  template void rnn_target_scan<T>(const RnnTargetScan<T>&, T*, const RnnExecution&);
TPEXT_INSTANTIATE(float)
TPEXT_INSTANTIATE(double)
TPEXT_INSTANTIATE(Bfloat16)
TPEXT_INSTANTIATE(Float16)

}  // namespace tpext::cuda
