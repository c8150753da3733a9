// gated_scan: the forward pass of a GRU or an LSTM (core/gates.h), from the input's part of the sums to h_t.
//     y_g = h_{t-1} W_g'   (all gates of one state),      h_t, c_t = step(x_proj_t, y, h_{t-1} or c_{t-1})
//
// Layouts stand in core/gated.h, work split, memory and determinism in sweep.h. The state h goes to all gates: what is
// read of it is read once, and all sums of a unit come to one thread, which does its step and keeps its c, or of a GRU
// its h, for the next. A step reads G B H elements a member and writes B H, and 4 or 5 B H that the backward pass
// reads; 2 G B H^2 operations. Predicted by plan.h at 1.8 GHz, not measured: H = 64 and one row a block 530 cycles a
// step, 0.29 us; H = 100 in clusters of 2 and one row 1660, 0.92 us.
#include "core/gates.h"
#include "cuda/activations.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace tpext::cuda {
namespace {

template <class T, class Cell>
struct GatedStep {
  using Storage = T;
  using C = Compute<T>;
  static constexpr int kGates = Cell::kGates, kKept = Cell::kKept;
  using Products = Fan<1, 1, kGates>;
  static constexpr int kOwn = 1;  // c, or a GRU's h
  static constexpr bool kBackward = false;
  static constexpr int ahead(int rows) { return rows == 1 ? 2 : 1; }
  struct Loads {
    T x[kGates], bias;
  };
  struct Start {};
  struct Result {
    C carried[1], own[1], kept[kKept];
  };

  int hidden;
  const T *x_proj, *bias_n, *h0, *c0, *weight_hh;
  T *states, *h_n, *c_n, *kept_states;

  GatedStep from_member(int64_t first, const RnnSizes& sizes) const {
    const int64_t initial = first * sizes.batch * sizes.hidden, all = initial * sizes.time;
    GatedStep part = *this;
    part.x_proj += all * kGates;
    part.h0 += initial;
    part.weight_hh += first * kGates * sizes.hidden * sizes.hidden;
    part.states += all;
    part.h_n += initial;
    if (bias_n != nullptr) part.bias_n += first * sizes.hidden;
    if (kept_states != nullptr) part.kept_states += all * kKept;
    if constexpr (Cell::kHasCell) {
      part.c0 += initial;
      part.c_n += initial;
    }
    return part;
  }

  __device__ Matrix<T> matrix(int gate) const { return {weight_hh, true, gate, kGates}; }
  __device__ T first_state(int64_t initial) const { return h0[initial]; }
  __device__ C first_own(int, int64_t initial) const { return to_compute((Cell::kHasCell ? c0 : h0)[initial]); }
  __device__ T* own(int) const { return Cell::kHasCell ? c_n : h_n; }
  __device__ Start start(int64_t) const { return {}; }

  __device__ void load(Loads& loads, const Place& at) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) loads.x[g] = x_proj[among(g, kGates, 0, at.element, at.column, hidden)];
    if constexpr (!Cell::kHasCell) loads.bias = bias_n == nullptr ? T{} : bias_n[at.unit];
  }

  __device__ Result advance(const Loads& loads, const Start&, const Position&, const Arriving<GatedStep>& y) const {
    C x[kGates], sums[kGates];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      x[g] = to_compute(loads.x[g]);
      sums[g] = Cell::kHasCell ? x[g] + y.sums[g] : y.sums[g];
    }
    typename Cell::Kept made;
    if constexpr (Cell::kHasCell) {
      made = Cell::step(sums, y.own[0]);
    } else {
      sums[kGates - 1] += to_compute(loads.bias);
      made = Cell::step(x, sums, y.own[0]);
    }
    Result result;
    result.carried[0] = made.state;
    result.own[0] = Cell::kHasCell ? made.values[kKept - 1] : made.state;
#pragma unroll
    for (int i = 0; i < kKept; ++i) result.kept[i] = made.values[i];
    return result;
  }

  __device__ void store(const Result& result, const Position& at) const {
    states[at.element] = from_compute<T>(at.valid ? result.carried[0] : C(0));
    if (kept_states == nullptr) return;
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      kept_states[among(i, kKept, 0, at.element, at.column, hidden)] =
          from_compute<T>(at.valid ? result.kept[i] : C(0));
  }

  __device__ void finish(const Position& at, const Arriving<GatedStep>& y, T state) const {
    h_n[at.initial] = state;
    if constexpr (Cell::kHasCell) c_n[at.initial] = from_compute<T>(y.own[0]);
  }
};

// run(Step()) of the cell.
template <class T, class Run>
auto with_cell(Cell cell, const Run& run) {
  using Math = ScalarMath<Compute<T>>;
  if (cell == Cell::gru) return run(GatedStep<T, Gru<Math>>());
  return run(GatedStep<T, Lstm<Math>>());
}

}  // namespace

template <class T>
RnnPlan plan_gated_scan(Cell cell, int64_t stack, int64_t batch, int64_t hidden, int device, Regime wanted) {
  return with_cell<T>(cell, [&]<class Step>(Step) {
    const auto choice = choose_sweep<Step>({stack, 0, batch, hidden, nullptr, nullptr}, device, wanted);
    return RnnPlan{choice.regime, choice.workspace_bytes, choice.cycles};
  });
}

template <class T>
void gated_scan(const GatedScan<T>& args, const T* x_proj, const T* bias_n, const RnnExecution& execution) {
  with_cell<T>(args.cell, [&]<class Step>(Step) {
    run_sweep(args.sizes, execution,
              Step{static_cast<int>(args.sizes.hidden), x_proj, bias_n, args.h0, args.c0, args.weight_hh, args.states,
                   args.h_n, args.c_n, args.kept});
  });
}

#define TPEXT_INSTANTIATE(T)                                                         \
  template RnnPlan plan_gated_scan<T>(Cell, int64_t, int64_t, int64_t, int, Regime); \
  template void gated_scan<T>(const GatedScan<T>&, const T*, const T*, const RnnExecution&);
TPEXT_INSTANTIATE(float)
TPEXT_INSTANTIATE(double)
TPEXT_INSTANTIATE(Bfloat16)
TPEXT_INSTANTIATE(Float16)

}  // namespace tpext::cuda
