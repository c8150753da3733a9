// What the kernels of gated recurrent layers need to know, in the notation of core/rnn.h. G gates, in torch's order and
// with torch's equations (core/gates.h has them), and K numbers a unit and step kept for the backward pass:
//     GRU   r, z, n       kept r, z, n and a = W_n h + b_hn
//     LSTM  i, f, g, o    kept i, f, g, o and c
#pragma once

#include "core/rnn.h"

namespace tpext {

enum class Cell { gru, lstm };

TPEXT_HOST_DEVICE constexpr int gate_count(Cell cell) { return cell == Cell::gru ? 3 : 4; }  // G
TPEXT_HOST_DEVICE constexpr int kept_count(Cell cell) { return cell == Cell::gru ? 4 : 5; }  // K

// How a step's displacement d becomes the moves m that it asks of the gates: the chain rule's with a slope of choice in
// place of each gate's derivative, or those of least norm that move the cell by d, all gates together.
enum class CellInverse { branch, cell };

template <class T>
struct GatedScan {
  RnnSizes sizes;
  Cell cell;
  RnnInput<T> input;
  const T* weight_ih;  // U [S, G H, I]
  const T* weight_hh;  // W [S, G H, H]
  const T* bias_ih;    // [S, G H], or null as bias_hh is
  const T* bias_hh;    // [S, G H]
  const T* h0;         // [S, B, H]
  const T* c0;         // [S, B, H], LSTM only
  T* states;           // [S, T, B, H], zero beyond a row's length
  T* h_n;              // [S, B, H] state after the last valid step, h0 without one
  T* c_n;              // [S, B, H], LSTM only
  T* kept;             // [S, T, B, K, H], zero beyond a row's length; or null
};

// Displacements d of h and c, or what of W or of a cell's own path comes back of the credit k; any may be null.
template <class T>
struct GatedStates {
  T *disp_h, *disp_c;      // [S, B, H], the second of an LSTM only, as below
  T *credit_h, *credit_c;  // [S, B, H], credit through time only
};

// d_{t-1} = -target_step g_{t-1} + direct(d_t) + m_t P, with all gradients of its delta: see RnnLayerBackward.
template <class T>
struct GatedLayerBackward {
  RnnSizes sizes;
  Cell cell;
  CellInverse inverse;
  bool through_time;
  Slope gate_slope, candidate_slope;  // inverse branch only
  MemberNumber<Compute<T>> target_step, margin, slope_reg;
  const T* grad_states;  // [S, T, B, H], or null: zero
  GatedStates<const T> beyond;
  const T* states;     // [S, T, B, H]
  const T* kept;       // [S, T, B, K, H]
  const T* h0;         // [S, B, H]
  const T* c0;         // [S, B, H], LSTM only
  const T* weight_hh;  // W [S, G H, H], through_time only
  const T* feedback;   // P [S, G H, H]
  GatedStates<T> initial;
  LayerGradients<T> gradients;  // of delta in the blocks of delta_blocks()
};

// Of the GRU's candidate the state and the input get errors that differ by the factor r: (a, r, z) and (r, z, n).
TPEXT_HOST_DEVICE constexpr DeltaBlocks delta_blocks(Cell cell) {
  if (cell == Cell::gru) return {4, gate_count(cell), {2, 0, 1, -1}, {-1, 0, 1, 2}};
  return {4, gate_count(cell), {0, 1, 2, 3}, {0, 1, 2, 3}};
}

}  // namespace tpext
