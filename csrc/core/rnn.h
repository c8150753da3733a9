// What a recurrent kernel needs to know: plain structures of sizes and pointers, shared by every backend.
//
// Notation, used throughout csrc: S stack (independent members: directions, ensembles), T time, B batch, H hidden.
// Arrays are dense and row-major, with the leading dimensions given beside each pointer. W is torch's weight_hh: row
// vectors step as h_t = a(x_proj_t + h_{t-1} W^T).
#pragma once

#include <cstdint>

#include "core/low_precision.h"
#include "core/member_number.h"

namespace tpext {

enum class Nonlinearity { tanh, relu, identity };

// How the displacement of one step becomes that of the step before it.
enum class Correction { linearized, difference, none, learned };

// What a displacement is multiplied by on its way back through the activation, correction linearized: a'/(a'^2 + r) of
// the clipped state, with r = slope_reg, a' of the state, or one.
enum class Slope { inverse, derivative, one };

struct RnnSizes {
  int64_t stack;
  int64_t time;
  int64_t batch;
  int64_t hidden;
  const int64_t* lengths;  // [B] valid steps of each row, or null: all T. Values outside 0..T are clamped.
  const uint8_t* reverse;  // [S] 1: the member runs from its last valid step to its first
};

// The input [S or 1, T, B, I] of a layer, its rows dense, its other strides free: batch-first inputs need no copy, and
// members that share it have a stride of 0.
template <class T>
struct RnnInput {
  const T* data;
  int64_t size;  // I
  int64_t member_stride, time_stride, batch_stride;

  const T* row(int64_t s, int64_t t, int64_t b) const {
    return data + s * member_stride + t * time_stride + b * batch_stride;
  }
};

// Either x_proj is given, or it is x_t U^T + bias of the input, which then never stands in memory.
template <class T>
struct RnnScan {
  RnnSizes sizes;
  Nonlinearity nonlinearity;
  const T* x_proj;     // [S, T, B, H], or null
  RnnInput<T> input;   // used without x_proj
  const T* weight_ih;  // U [S, H, I], used without x_proj
  const T* bias;       // [S, H], used without x_proj; or null
  const T* h0;         // [S, B, H]
  const T* weight_hh;  // [S, H, H]
  T* states;           // [S, T, B, H]
  T* h_n;              // [S, B, H] state after the last valid step, h0 without one; or null
};

template <class T>
struct RnnTargetScan {
  RnnSizes sizes;
  Nonlinearity nonlinearity;
  Correction correction;
  bool through_time;  // credit: the sum of local losses through the whole unrolled network, else each step alone
  Slope slope;        // correction linearized only, as is slope_reg
  MemberNumber<Compute<T>> target_step;
  MemberNumber<Compute<T>> margin;
  MemberNumber<Compute<T>> slope_reg;
  const T* grad_states;  // [S, T, B, H], or null: zero
  const T* disp_n;       // [S, B, H] displacement that comes from beyond the last valid step, or null: zero
  const T* credit_n;     // [S, B, H] e W from there, through_time only; or null: zero
  const T* states;       // [S, T, B, H]
  const T* h0;           // [S, B, H]; correction none only
  const T* weight_hh;    // [S, H, H]; through_time only
  const T* inverse;      // [S, H, H] R = P', such as the regularised inverse of W; for correction learned V
  bool is_feedback;      // `inverse` holds P itself
  const T* x_proj;       // [S, T, B, H]; correction none only
  const T* reverse_pre;  // [S, T, B, H] pre-activations of the reverse layer; correction learned only
  T* delta;              // [S, T, B, H]
  T* disp_h0;            // [S, B, H]
  T* credit_h0;          // [S, B, H] e_1 W, through_time only; or null
  T* norms;              // [S, T, B] or null
  T* displacement;       // [S, T, B, H] displacement of the pre-activation, or null
};

// A row of delta: D blocks of H, each the error of what a gate gets of the state, of what it gets of the input, or of
// their sum. Blocks of either kind are neighbours, G of them.
struct DeltaBlocks {
  static constexpr int kMost = 4;
  int count, gates;     // D, G
  int of_state[kMost];  // the gate whose rows of W a block belongs to, or -1
  int of_input[kMost];  // the same of U

  // The first block of the input's.
  int first_of_input() const {
    int block = 0;
    while (of_input[block] < 0) ++block;
    return block;
  }
};

constexpr DeltaBlocks kOneBlock = {1, 1, {0}, {0}};

// [dW, dU, db] = scale * sum over t and rows of delta_t' [h_{t-1}, x_t, 1]; delta is zero beyond a row's length
template <class T>
struct RnnWeightGradients {
  RnnSizes sizes;
  MemberNumber<Compute<T>> scale;
  const T* delta;     // [S, T, B, D H]
  const T* states;    // [S, T, B, H]
  const T* h0;        // [S, B, H]
  RnnInput<T> input;  // used for grad_weight_ih
  T* grad_weight_ih;  // dU [S, G H, I], or null
  T* grad_weight_hh;  // dW [S, G H, H], or null
  T* grad_bias;       // db [S, G H] of the input's blocks, or null
  T* grad_bias_hh;    // db [S, G H] of the state's blocks, or null
  DeltaBlocks blocks = kOneBlock;
};

// All the gradients that the delta of a pass gives.
template <class T>
struct LayerGradients {
  RnnWeightGradients<T> parameters;  // without delta
  const T* input_feedback;           // [S, G H, I] U, or P_U of a displacement; or null
  bool of_displacement;              // grad_input = input_scale * z_t P_U in place of input_scale * e_t U
  MemberNumber<Compute<T>> input_scale;
  T* grad_input;  // [S, T, B, I], or null
};

// A target pass with the gradients of its delta, which stands in memory as a tile of time only, or whole where rows are
// many and steps few (group_count in cpu/layer_gradients.h).
template <class T>
struct RnnLayerBackward {
  RnnTargetScan<T> pass;  // without delta, norms and displacement
  LayerGradients<T> gradients;
};

}  // namespace tpext
