// core/activations.h and core/gates.h for one number at a time, of choices that are made when the kernel runs: the same
// functions as cpu/activations.h has for vectors, to within rounding.
#pragma once

#include <cmath>

#include "core/activations.h"

namespace tpext::cuda {

template <class Number>
struct ScalarMath {
  using T = Number;
  using V = T;
  // Of T on a device; the emulation computes in double, and rounds what is made of it.
  TPEXT_HOST_DEVICE static auto tanh(T u) { return ::tanh(u); }
  // Where exp overflows, zero.
  TPEXT_HOST_DEVICE static T sigmoid(T u) { return T(1) / (T(1) + ::exp(-u)); }
  TPEXT_HOST_DEVICE static T rounded_product(T a, T b) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 4) return __fmul_rn(a, b);
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
  }
  // The larger of p and q divides, so that log1p's argument stays above -1/2 ... 0 or goes up from 0, where it is exact
  // to rounding.
  TPEXT_HOST_DEVICE static T half_log_ratio(T p, T q, T p_minus_q) {
    const bool grows = p_minus_q >= T(0);
    const T size = ::log1p(grows ? p_minus_q / q : -p_minus_q / p);
    return T(0.5) * (grows ? size : -size);
  }
};

template <class T>
using ScalarActivations = Activations<ScalarMath<T>>;

}  // namespace tpext::cuda
