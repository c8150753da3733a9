// The sweep from the last valid step to the first, then to the initial state: back-propagation through time and the
// target passes are the same kernels with other settings. Defined in rnn_target_scan.cu.
#pragma once

#include "cuda/kernels.h"

namespace tpext::cuda {

// What the parameters' gradients are made of: plain back-propagation, each step's own loss, or all through the layer.
enum class Credit { backprop, local, through_time };

// What a backward sweep reads and writes, as core/rnn.h has it; any pointer may be null but states, delta and the
// matrix of each product.
template <class T>
struct BackwardArrays {
  Nonlinearity nonlinearity;
  Correction correction;
  Slope slope;
  Compute<T> target_step, margin, slope_reg;
  const T* weight_hh;        // product e W: back-propagation and credit through time
  const T* inverse;          // product z P, P = inverse': target passes
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

template <class T>
RnnPlan plan_backward_sweep(Credit credit, const RnnSizes& sizes, int device, Regime wanted);
template <class T>
void run_backward_sweep(Credit credit, const BackwardArrays<T>& arrays, const RnnSizes& sizes,
                        const RnnExecution& execution);

}  // namespace tpext::cuda
