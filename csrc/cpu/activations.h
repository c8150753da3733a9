// The nonlinearities a, their derivatives from the state h = a(u), and the inverses that a target needs; for vectors.
#pragma once

#include "core/rnn.h"
#include "cpu/simd.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

template <Nonlinearity A, class T>
inline Vec<T> activate(Vec<T> u) {
  if constexpr (A == Nonlinearity::tanh) return tanh<T>(u);
  // Written so that NaN passes, as it does through torch.relu.
  if constexpr (A == Nonlinearity::relu) return u < 0 ? Vec<T>{} : u;
  if constexpr (A == Nonlinearity::identity) return u;
}

// m * a'(u) for h = a(u). Zero comes out as +0 for any h, beyond tanh's range too, as rows that are no more computed
// get it.
template <Nonlinearity A, class T>
inline Vec<T> times_derivative(Vec<T> m, Vec<T> h) {
  if constexpr (A == Nonlinearity::tanh) return m * (T(1) - h * h) + T(0);
  if constexpr (A == Nonlinearity::relu) return h > 0 ? m : Vec<T>{};
  if constexpr (A == Nonlinearity::identity) return m;
}

template <class T>
inline Vec<T> clamp(Vec<T> v, T bound) {
  v = v > bound ? Vec<T>{} + bound : v;
  return v < -bound ? Vec<T>{} - bound : v;
}

// d / a'(u) for h = a(u), with tanh's h kept inside +-bound.
template <Nonlinearity A, class T>
inline Vec<T> over_derivative(Vec<T> d, Vec<T> h, T bound) {
  if constexpr (A == Nonlinearity::tanh) {
    const Vec<T> kept = clamp<T>(h, bound);
    return d / (T(1) - kept * kept);
  }
  if constexpr (A == Nonlinearity::relu) return h > 0 ? d : Vec<T>{};
  if constexpr (A == Nonlinearity::identity) return d;
}

// d * a'(u) / (a'(u)^2 + reg) for h = a(u), with tanh's h kept inside +-bound.
template <Nonlinearity A, class T>
inline Vec<T> over_derivative(Vec<T> d, Vec<T> h, T bound, T reg) {
  if constexpr (A == Nonlinearity::tanh) {
    const Vec<T> kept = clamp<T>(h, bound);
    const Vec<T> slope = T(1) - kept * kept;
    return d * slope / (slope * slope + reg);
  }
  if constexpr (A == Nonlinearity::relu) return h > 0 ? d / (T(1) + reg) : Vec<T>{};
  if constexpr (A == Nonlinearity::identity) return d / (T(1) + reg);
}

// a^-1(v), with tanh's v kept inside +-bound and relu's above zero.
template <Nonlinearity A, class T>
inline Vec<T> inverse_activate(Vec<T> v, T bound) {
  if constexpr (A == Nonlinearity::tanh) return atanh<T>(clamp<T>(v, bound));
  if constexpr (A == Nonlinearity::relu) return v < 0 ? Vec<T>{} : v;
  if constexpr (A == Nonlinearity::identity) return v;
}

// a^-1(h + d) - a^-1(h). Where no bound is touched the displacement itself enters, not the rounded difference of the
// two.
template <Nonlinearity A, class T>
inline Vec<T> inverse_difference(Vec<T> h, Vec<T> d, T bound) {
  const Vec<T> v = h + d;
  if constexpr (A == Nonlinearity::tanh) {
    const Vec<T> kept_v = clamp<T>(v, bound), kept_h = clamp<T>(h, bound);
    const Bits<T> untouched = (kept_v == v) & (kept_h == h);
    return atanh_difference<T>(kept_v, kept_h, untouched ? d : kept_v - kept_h);
  }
  if constexpr (A == Nonlinearity::relu) return h < 0 ? (v < 0 ? Vec<T>{} : v) : v < 0 ? T(0) - h : d;
  if constexpr (A == Nonlinearity::identity) return d;
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
