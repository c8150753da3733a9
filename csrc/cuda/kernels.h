// The kernels of this backend. Every pointer in their arguments is one of the queue's device but `RnnSizes::reverse`;
// they are enqueued, nothing waits for them. T is float, double, Bfloat16 or Float16; the 16-bit formats compute in
// float. Throws CudaError.
#pragma once

#include "core/counter_normal.h"
#include "core/gated.h"
#include "core/pooled_difference.h"
#include "core/regularized_inverse.h"
#include "core/rnn.h"
#include "cuda/launch.h"

namespace tpext::cuda {

// Where the recurrent weights stay for the whole sequence, and with that how the work is split (cuda/sweep.h).
enum class Regime {
  automatic,
  block,    // in the registers of one block, which keeps its batch rows for all steps
  cluster,  // spread over the blocks of a cluster, states exchanged through distributed shared memory; sm_90
  grid,     // spread over blocks of a cooperative grid, states exchanged through global memory
  step,     // nowhere: a matrix product by the caller and one call a step
};

struct RnnPlan {
  Regime regime;
  int64_t workspace_bytes;  // zeroed memory that a call needs
  double cycles;            // predicted, of a step; 0 in regime step
};

// What a recurrent call needs besides its arguments. `regime` may be automatic; any other must be possible.
//
// With the regime `step` a call does one step of the sweep, number `step` of 0 .. T, or what follows the last one
// (number T): the caller has multiplied.
struct RnnExecution {
  Queue queue;
  Regime regime;
  void* workspace;  // zeroed, of at least the plan's size
  int64_t workspace_bytes;
  int64_t step;      // regime step only, as the two below
  const void* sums;  // [P, S, B, H] the products of `carried` with the weights; of gates [P, S, B, out H]
  void* carried;     // [P, S, B, H] what the next step multiplies, replaced in place: h, or z and e (core/rnn.h); of
                     // gates going back [P, S, B, G H], their moves, and through time their errors
};

// The regime of a scan with `products` products of H x H a step (2: a target pass through time, else 1). Throws
// std::invalid_argument where `wanted` is not automatic and cannot run such sizes on the device.
template <class T>
RnnPlan plan_rnn(int products, int64_t stack, int64_t batch, int64_t hidden, int device, Regime wanted);

// `x_proj` must be given.
template <class T>
void rnn_scan(const RnnScan<T>& args, const RnnExecution& execution);
// Numbers are those of all members. `norms` must be null; `displacement_of_state` [S, T, B, H] receives d_t, or is
// null.
template <class T>
void rnn_target_scan(const RnnTargetScan<T>& args, T* displacement_of_state, const RnnExecution& execution);

// GRU and LSTM. `x_proj` [S, T, B, G H] is the input's part of all sums, with both biases but of the GRU's candidate
// that of W, which is `bias_n` [S, H], or null; of `args` neither the input nor its weights nor biases are read.
template <class T>
void gated_scan(const GatedScan<T>& args, const T* x_proj, const T* bias_n, const RnnExecution& execution);
// Numbers are those of all members; `args.initial` must be whole, `args.gradients` is not read: `delta`
// [S, T, B, D, H], in the blocks of delta_blocks(), gives them.
template <class T>
void gated_target_scan(const GatedLayerBackward<T>& args, T* delta, const RnnExecution& execution);
// As plan_rnn.
template <class T>
RnnPlan plan_gated_scan(Cell cell, int64_t stack, int64_t batch, int64_t hidden, int device, Regime wanted);
template <class T>
RnnPlan plan_gated_target_scan(Cell cell, bool through_time, int64_t stack, int64_t batch, int64_t hidden, int device,
                               Regime wanted);

// float and double; min(M, N) and max(M, N) at most kLargestInverse; one reg for all. A matrix that fails gets NaN in
// all its inverse.
constexpr int64_t kLargestInverse = 128;
template <class T>
void regularized_inverse(const RegularizedInverse<T>& args, const Queue& queue);

// float and double.
template <class T>
void counter_normal(const CounterNormal<T>& args, const Queue& queue);
template <class T>
void code_difference(const CodeDifference<T>& args, const Queue& queue);
template <class T>
void probe_difference(const ProbeDifference<T>& args, const Queue& queue);

}  // namespace tpext::cuda
