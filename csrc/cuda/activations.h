// The nonlinearities a, their derivatives from the state h = a(u), and the inverses that a target needs; one number at
// a time. The same functions as cpu/activations.h has for vectors, to within rounding.
#pragma once

#include <cmath>

#include "core/rnn.h"
#include "cuda/device.h"

namespace tpext::cuda {

template <class T>
__device__ inline T activate(Nonlinearity a, T u) {
  if (a == Nonlinearity::tanh) return tanh(u);
  // Written so that NaN passes, as it does through torch.relu.
  if (a == Nonlinearity::relu) return u < T(0) ? T(0) : u;
  return u;
}

// m * a'(u) for h = a(u).
template <class T>
__device__ inline T times_derivative(Nonlinearity a, T m, T h) {
  if (a == Nonlinearity::tanh) return m * (T(1) - h * h);
  if (a == Nonlinearity::relu) return h > T(0) ? m : T(0);
  return m;
}

// Written so that NaN passes.
template <class T>
__device__ inline T clamp(T v, T bound) {
  v = v > bound ? bound : v;
  return v < -bound ? -bound : v;
}

// d / a'(u) for h = a(u), with tanh's h kept inside +-bound.
template <class T>
__device__ inline T over_derivative(Nonlinearity a, T d, T h, T bound) {
  if (a == Nonlinearity::tanh) {
    const T kept = clamp(h, bound);
    return d / (T(1) - kept * kept);
  }
  if (a == Nonlinearity::relu) return h > T(0) ? d : T(0);
  return d;
}

// d * a'(u) / (a'(u)^2 + reg) for h = a(u), with tanh's h kept inside +-bound.
template <class T>
__device__ inline T over_derivative(Nonlinearity a, T d, T h, T bound, T reg) {
  if (a == Nonlinearity::tanh) {
    const T kept = clamp(h, bound);
    const T slope = T(1) - kept * kept;
    return d * slope / (slope * slope + reg);
  }
  if (a == Nonlinearity::relu) return h > T(0) ? d / (T(1) + reg) : T(0);
  return d / (T(1) + reg);
}

// 1/2 log(p / q) for positive p, q, given p - q to its own full precision. The larger divides, so that log1p's argument
// stays above -1/2 ... 0 or goes up from 0, where it is exact to rounding.
template <class T>
__device__ inline T half_log_ratio(T p, T q, T p_minus_q) {
  const bool grows = p_minus_q >= T(0);
  const T size = log1p(grows ? p_minus_q / q : -p_minus_q / p);
  return T(0.5) * (grows ? size : -size);
}

// a^-1(v), with tanh's v kept inside +-bound and relu's above zero.
template <class T>
__device__ inline T inverse_activate(Nonlinearity a, T v, T bound) {
  if (a == Nonlinearity::tanh) {
    const T kept = clamp(v, bound);
    return half_log_ratio(T(1) + kept, T(1) - kept, kept + kept);
  }
  if (a == Nonlinearity::relu) return v < T(0) ? T(0) : v;
  return v;
}

// a^-1(h + d) - a^-1(h). Where no bound is touched the displacement itself enters, not the rounded difference of the
// two.
template <class T>
__device__ inline T inverse_difference(Nonlinearity a, T h, T d, T bound) {
  const T v = h + d;
  if (a == Nonlinearity::tanh) {
    const T kept_v = clamp(v, bound), kept_h = clamp(h, bound);
    const T difference = kept_v == v && kept_h == h ? d : kept_v - kept_h;
    return half_log_ratio((T(1) + kept_v) * (T(1) - kept_h), (T(1) - kept_v) * (T(1) + kept_h),
                          difference + difference);
  }
  if (a == Nonlinearity::relu) return h < T(0) ? (v < T(0) ? T(0) : v) : v < T(0) ? T(0) - h : d;
  return d;
}

// tanh(q + a) - tanh(q) = tanh(a) (1 - tanh(q) tanh(q + a)), which keeps the precision of a small a.
template <class T>
__device__ inline T tanh_difference(T q, T a) {
  return tanh(a) * (T(1) - tanh(q) * tanh(q + a));
}

}  // namespace tpext::cuda
