// What a recurrent kernel needs to know: plain structures of sizes and pointers, shared by every backend.
//
// Notation, used throughout csrc: S stack (independent members: directions, ensembles), T time, B batch, H hidden.
// Arrays are dense and row-major, with the leading dimensions given beside each pointer. W is torch's weight_hh: row
// vectors step as h_t = a(x_proj_t + h_{t-1} W^T).
#pragma once

#include <cstdint>

namespace tpext {

enum class Nonlinearity { tanh, relu, identity };

// How the displacement of one step becomes that of the step before it.
enum class Correction { linearized, difference, none, learned };

struct RnnSizes {
  int64_t stack;
  int64_t time;
  int64_t batch;
  int64_t hidden;
  const int64_t* lengths;  // [B] valid steps of each row, or null: all T. Values outside 0..T are clamped.
  const uint8_t* reverse;  // [S] 1: the member runs from its last valid step to its first
};

template <class T>
struct RnnScan {
  RnnSizes sizes;
  Nonlinearity nonlinearity;
  const T* x_proj;     // [S, T, B, H]
  const T* h0;         // [S, B, H]
  const T* weight_hh;  // [S, H, H]
  T* states;           // [S, T, B, H]
};

template <class T>
struct RnnScanBackward {
  RnnSizes sizes;
  Nonlinearity nonlinearity;
  const T* grad_states;  // [S, T, B, H]
  const T* states;       // [S, T, B, H]
  const T* weight_hh;    // [S, H, H]
  T* grad_x_proj;        // [S, T, B, H]
  T* grad_h0;            // [S, B, H]
};

template <class T>
struct RnnTargetScan {
  RnnSizes sizes;
  Nonlinearity nonlinearity;
  Correction correction;
  bool through_time;  // credit: the sum of local losses through the whole unrolled network, else each step alone
  T target_step;
  T clip;
  const T* grad_states;  // [S, T, B, H]
  const T* states;       // [S, T, B, H]
  const T* h0;           // [S, B, H]; correction none only
  const T* weight_hh;    // [S, H, H]; through_time only
  const T* inverse;      // [S, H, H] regularised inverse R of W; for correction learned the reverse weight V
  const T* x_proj;       // [S, T, B, H]; correction none only
  const T* reverse_pre;  // [S, T, B, H] pre-activations of the reverse layer; correction learned only
  T* delta;              // [S, T, B, H]
  T* disp_h0;            // [S, B, H]
  T* norms;              // [S, T, B] or null
  T* displacement;       // [S, T, B, H] displacement of the pre-activation, or null
};

}  // namespace tpext
