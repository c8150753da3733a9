// core/activations.h for vectors, of a nonlinearity that is known at compile time.
#pragma once

#include "core/activations.h"
#include "cpu/simd.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

template <class Element>
struct VectorMath {
  using T = Element;
  using V = Vec<T>;
  static V tanh(V u) { return TPEXT_CAPABILITY::tanh<T>(u); }
  static V sigmoid(V u) { return TPEXT_CAPABILITY::sigmoid<T>(u); }
  static V rounded_product(V a, V b) { return TPEXT_CAPABILITY::rounded_product<T>(a, b); }
  static V half_log_ratio(V p, V q, V p_minus_q) { return TPEXT_CAPABILITY::half_log_ratio<T>(p, q, p_minus_q); }
};

template <class T>
using VectorActivations = Activations<VectorMath<T>>;

template <Nonlinearity A, class T>
inline Vec<T> activate(Vec<T> u) {
  return VectorActivations<T>::activate(A, u);
}

template <Nonlinearity A, class T>
inline Vec<T> times_derivative(Vec<T> m, Vec<T> h) {
  return VectorActivations<T>::times_derivative(A, m, h);
}

template <Nonlinearity A, class T>
inline Vec<T> inverse_activate(Vec<T> v, T bound) {
  return VectorActivations<T>::inverse_activate(A, v, bound);
}

template <Nonlinearity A, class T>
inline Vec<T> inverse_difference(Vec<T> h, Vec<T> d, T bound) {
  return VectorActivations<T>::inverse_difference(A, h, d, bound);
}

template <class T>
inline Vec<T> tanh_difference(Vec<T> q, Vec<T> a) {
  return VectorActivations<T>::tanh_difference(q, a);
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
