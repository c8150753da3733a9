// rnn_scan:  h_t = a(x_proj_t + h_{t-1} W')
//
// Layouts stand in core/rnn.h, work split, memory and determinism in sweep.h. A step reads x_proj once and writes h
// once: 2 B H elements a member; 2 B H^2 operations. Predicted by plan.h for an H200 at 1.8 GHz, not measured: H = 100
// and one row a block 500 cycles a step, 0.28 us; H = 128 and four rows 910, 0.51 us; H = 512 in clusters of 8 and four
// rows 2400, 1.3 us.
#include "cuda/activations.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace tpext::cuda {
namespace {

template <class T>
struct ForwardStep {
  using Storage = T;
  using C = Compute<T>;
  using Products = Fan<1, 1, 1>;
  static constexpr int kOwn = 0;
  static constexpr bool kBackward = false;
  static constexpr int ahead(int rows) { return rows == 1 ? 4 : 2; }
  struct Loads {
    T x;
  };
  struct Start {};
  struct Result {
    C carried[1];
  };

  Nonlinearity nonlinearity;
  const T *x_proj, *h0, *weight_hh;
  T *states, *h_n;

  ForwardStep from_member(int64_t first, const RnnSizes& sizes) const {
    const int64_t initial = first * sizes.batch * sizes.hidden, all = initial * sizes.time;
    ForwardStep part = *this;
    part.x_proj += all;
    part.h0 += initial;
    part.weight_hh += first * sizes.hidden * sizes.hidden;
    part.states += all;
    if (h_n != nullptr) part.h_n += initial;
    return part;
  }

  __device__ Matrix<T> matrix(int) const { return {weight_hh, true}; }
  __device__ T first_state(int64_t initial) const { return h0[initial]; }
  __device__ void load(Loads& loads, const Place& at) const { loads.x = x_proj[at.element]; }
  __device__ Start start(int64_t) const { return {}; }
  __device__ Result advance(const Loads& loads, const Start&, const Position&, const Arriving<ForwardStep>& y) const {
    return {{ScalarActivations<C>::activate(nonlinearity, to_compute(loads.x) + y.sums[0])}};
  }
  __device__ void store(const Result& result, const Position& at) const {
    states[at.element] = from_compute<T>(at.valid ? result.carried[0] : C(0));
  }
  __device__ void finish(const Position& at, const Arriving<ForwardStep>&, T state) const {
    if (h_n != nullptr) h_n[at.initial] = state;
  }
};

}  // namespace

template <class T>
void rnn_scan(const RnnScan<T>& args, const RnnExecution& execution) {
  const ForwardStep<T> step{args.nonlinearity, args.x_proj, args.h0, args.weight_hh, args.states, args.h_n};
  run_sweep(args.sizes, execution, step);
}

#define TPEXT_INSTANTIATE(T) template void rnn_scan<T>(const RnnScan<T>&, const RnnExecution&);
TPEXT_INSTANTIATE(float)
TPEXT_INSTANTIATE(double)
TPEXT_INSTANTIATE(Bfloat16)
TPEXT_INSTANTIATE(Float16)

}  // namespace tpext::cuda
