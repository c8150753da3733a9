// gated_target_scan: the target pass of a GRU or an LSTM from the last step to the first, which leaves delta.
//     d_{t-1} = -target_step g_{t-1} + direct(d_t) + sum_k m_{t,k} P_k        m_t the moves that d_t asks of the gates
//     k_{t-1} = -d_{t-1} [+ direct(k_t) + sum_k e_{t,k} W_k]  through time    e_t the errors that the credit k_t gives
// with m, e and what is handed on unit by unit in core/gates.h.
//
// Layouts stand in core/gated.h, work split, memory and determinism in sweep.h. The states of the sweep are the moves
// of the G gates, which fan in to one sum of depth G H, and through time the errors, which fan in to another; what is
// handed on directly stays with the thread of the unit. A step reads what was kept, 4 or 5 B H elements a member, the
// state or c before and g, and writes the 4 B H of delta; 2 G B H^2 operations, twice that through time. Predicted by
// plan.h at 1.8 GHz, not measured: H = 64 and one row a block 530 cycles a step, 0.29 us, through time 660; H = 100 in
// clusters of 2 and one row 1660, 0.92 us, through time in clusters of 7 as many.
#include "core/gates.h"
#include "cuda/activations.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace tpext::cuda {
namespace {

// What the pass reads and writes, as core/gated.h has it.
template <class T>
struct GatedArrays {
  int hidden;
  Compute<T> target_step;
  GateRule<Compute<T>> rule;
  const T* grad_states;  // or null, as what comes from beyond
  GatedStates<const T> beyond;
  const T *states, *kept, *h0, *c0, *weight_hh, *feedback;
  GatedStates<T> initial;
  T* delta;  // [S, T, B, D, H]
};

template <class T, class Cell, bool kThroughTime>
struct GatedBackStep {
  using Storage = T;
  using C = Compute<T>;
  static constexpr int kGates = Cell::kGates, kKept = Cell::kKept, kBlocks = Cell::kBlocks;
  using Products = Fan<kThroughTime ? 2 : 1, kGates, 1>;
  static constexpr int kOwn = kThroughTime ? 2 : 1;  // what is handed on of d, and of k
  static constexpr bool kBackward = true;
  static constexpr int ahead(int rows) { return rows == 1 ? 2 : 1; }
  struct Loads {
    T kept[kKept], before, g;
  };
  // Of h, from beyond the row's last valid step.
  struct Start {
    C displacement, credit;
  };
  struct Result {
    C carried[Products::kStates];  // by gates: m; through time e too
    C own[kOwn], delta[kBlocks];
  };

  GatedArrays<T> arrays;

  GatedBackStep from_member(int64_t first, const RnnSizes& sizes) const {
    const int64_t initial = first * sizes.batch * sizes.hidden, all = initial * sizes.time;
    const int64_t weights = first * kGates * sizes.hidden * sizes.hidden;
    GatedBackStep part = *this;
    const auto move = [](auto*& pointer, int64_t by) {
      if (pointer != nullptr) pointer += by;
    };
    const auto move_states = [&](auto& of) {
      for (auto* pointer : {&of.disp_h, &of.disp_c, &of.credit_h, &of.credit_c}) move(*pointer, initial);
    };
    move(part.arrays.grad_states, all);
    move_states(part.arrays.beyond);
    move_states(part.arrays.initial);
    move(part.arrays.states, all);
    move(part.arrays.kept, all * kKept);
    move(part.arrays.h0, initial);
    move(part.arrays.c0, initial);
    move(part.arrays.weight_hh, weights);
    move(part.arrays.feedback, weights);
    move(part.arrays.delta, all * kBlocks);
    return part;
  }

  __device__ Matrix<T> matrix(int p) const {
    return {p < kGates ? arrays.feedback : arrays.weight_hh, false, p % kGates, kGates};
  }
  __device__ T first_state(int64_t) const { return T{}; }
  __device__ static C read(const T* array, int64_t at) { return array == nullptr ? C(0) : to_compute(array[at]); }
  // A GRU's has h alone, of which all comes with the start.
  __device__ C first_own(int o, int64_t initial) const {
    return Cell::kHasCell ? read(o == 0 ? arrays.beyond.disp_c : arrays.beyond.credit_c, initial) : C(0);
  }
  __device__ T* own(int o) const {
    if (Cell::kHasCell) return o == 0 ? arrays.initial.disp_c : arrays.initial.credit_c;
    return o == 0 ? arrays.initial.disp_h : arrays.initial.credit_h;
  }
  __device__ Start start(int64_t initial) const {
    return {read(arrays.beyond.disp_h, initial), kThroughTime ? read(arrays.beyond.credit_h, initial) : C(0)};
  }

  __device__ void load(Loads& loads, const Place& at) const {
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      loads.kept[i] = arrays.kept[among(i, kKept, 0, at.element, at.column, arrays.hidden)];
    loads.g = arrays.grad_states == nullptr ? T{} : arrays.grad_states[at.element];
    // Of the step before this in the row's run, if it is not the first: then it is the initial one.
    const int64_t before = at.element + at.next;
    loads.before = T{};
    if (!at.ends)
      loads.before = Cell::kHasCell ? arrays.kept[among(kKept - 1, kKept, 0, before, at.column, arrays.hidden)]
                                    : arrays.states[before];
  }

  // What the products bring and what was handed on: of displacements or of credits.
  __device__ static OfStates<C> joined(const Arriving<GatedBackStep>& y, int set, bool from_beyond, C beyond) {
    return Cell::join(from_beyond ? beyond : y.sums[set], y.own[set]);
  }

  __device__ Result advance(const Loads& loads, const Start& start, const Position& at,
                            const Arriving<GatedBackStep>& y) const {
    C kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = to_compute(loads.kept[i]);
    const C before = to_compute(at.last ? (Cell::kHasCell ? arrays.c0 : arrays.h0)[at.initial] : loads.before);
    OfStates<C> d = joined(y, 0, at.first, start.displacement), k = {C(0), C(0)};
    d.h -= to_compute(loads.g) * arrays.target_step;
    if constexpr (kThroughTime) k = joined(y, 1, at.first, start.credit);
    k = {k.h - d.h, k.c - d.c};
    const auto errors = Cell::errors(k, kept, before);
    const auto moves = Cell::moves(arrays.rule, d, kept, before);
    constexpr DeltaBlocks of = delta_blocks(Cell::kHasCell ? tpext::Cell::lstm : tpext::Cell::gru);
    Result result;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      result.delta[b] = errors.of_blocks[b];
      if (of.of_state[b] < 0) continue;
      result.carried[of.of_state[b]] = moves.of_blocks[b];
      if constexpr (kThroughTime) result.carried[kGates + of.of_state[b]] = errors.of_blocks[b];
    }
    result.own[0] = moves.direct;
    if constexpr (kThroughTime) result.own[1] = errors.direct;
    return result;
  }

  __device__ void store(const Result& result, const Position& at) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
      arrays.delta[among(b, kBlocks, 0, at.element, at.column, arrays.hidden)] =
          from_compute<T>(at.valid ? result.delta[b] : C(0));
  }

  // `at.valid`: the row has a step.
  __device__ void finish(const Position& at, const Arriving<GatedBackStep>& y, T) const {
    const Start start = at.valid ? Start{} : this->start(at.initial);
    const OfStates<C> d = joined(y, 0, !at.valid, start.displacement);
    arrays.initial.disp_h[at.initial] = from_compute<T>(d.h);
    if (Cell::kHasCell) arrays.initial.disp_c[at.initial] = from_compute<T>(d.c);
    if constexpr (kThroughTime) {
      const OfStates<C> k = joined(y, 1, !at.valid, start.credit);
      arrays.initial.credit_h[at.initial] = from_compute<T>(k.h);
      if (Cell::kHasCell) arrays.initial.credit_c[at.initial] = from_compute<T>(k.c);
    }
  }
};

// run(Step()) of the cell and the credit.
template <class T, class Run>
auto with_pass(Cell cell, bool through_time, const Run& run) {
  using Math = ScalarMath<Compute<T>>;
  if (cell == Cell::gru)
    return through_time ? run(GatedBackStep<T, Gru<Math>, true>()) : run(GatedBackStep<T, Gru<Math>, false>());
  return through_time ? run(GatedBackStep<T, Lstm<Math>, true>()) : run(GatedBackStep<T, Lstm<Math>, false>());
}

}  // namespace

template <class T>
RnnPlan plan_gated_target_scan(Cell cell, bool through_time, int64_t stack, int64_t batch, int64_t hidden, int device,
                               Regime wanted) {
  return with_pass<T>(cell, through_time, [&]<class Step>(Step) {
    const auto choice = choose_sweep<Step>({stack, 0, batch, hidden, nullptr, nullptr}, device, wanted);
    return RnnPlan{choice.regime, choice.workspace_bytes, choice.cycles};
  });
}

template <class T>
void gated_target_scan(const GatedLayerBackward<T>& args, T* delta, const RnnExecution& execution) {
  const GatedArrays<T> arrays{
      static_cast<int>(args.sizes.hidden),
      args.target_step.of(0),
      {args.inverse, args.gate_slope, args.candidate_slope, args.margin.of(0), args.slope_reg.of(0)},
      args.grad_states,
      args.beyond,
      args.states,
      args.kept,
      args.h0,
      args.c0,
      args.weight_hh,
      args.feedback,
      args.initial,
      delta};
  with_pass<T>(args.cell, args.through_time, [&]<class Step>(Step) { run_sweep(args.sizes, execution, Step{arrays}); });
}

#define TPEXT_INSTANTIATE(T)                                                                      \
  template RnnPlan plan_gated_target_scan<T>(Cell, bool, int64_t, int64_t, int64_t, int, Regime); \
  template void gated_target_scan<T>(const GatedLayerBackward<T>&, T*, const RnnExecution&);
TPEXT_INSTANTIATE(float)
TPEXT_INSTANTIATE(double)
TPEXT_INSTANTIATE(Bfloat16)
TPEXT_INSTANTIATE(Float16)

}  // namespace tpext::cuda
