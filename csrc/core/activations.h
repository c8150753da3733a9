// The nonlinearities a of a recurrent layer, their slopes from the state h = a(u), and the inverses that a target
// needs: the mathematics of a step, for every backend.
//
// Math is the backend's: a number V, its element T, and the two functions that each computes in a way of its own,
//     tanh(V u)      half_log_ratio(V p, V q, V p_minus_q) = 1/2 log(p / q) of positive p, q, given p - q to its own
//                                                            full precision
// V is a scalar (V = T), or a vector of the compiler's extension, whose comparisons choose lane by lane. Where `a` is a
// constant, what is left of a function is that nonlinearity's branch. Comparisons are written so that NaN passes.
#pragma once

#include <type_traits>

#include "core/rnn.h"

namespace tpext {

template <class Math>
struct Activations {
  using V = typename Math::V;
  using T = typename Math::T;

  TPEXT_HOST_DEVICE static V activate(Nonlinearity a, V u) {
    if (a == Nonlinearity::tanh) return Math::tanh(u);
    if (a == Nonlinearity::relu) return u < 0 ? V{} : u;
    return u;
  }

  // m * a'(u). Zero comes out as +0 for any h, beyond tanh's range too, as rows that are no more computed get it.
  TPEXT_HOST_DEVICE static V times_derivative(Nonlinearity a, V m, V h) {
    if (a == Nonlinearity::tanh) return m * (1 - h * h) + 0;
    if (a == Nonlinearity::relu) return h > 0 ? m : V{};
    return m;
  }

  // d / a'(u), with tanh's h kept inside +-bound.
  TPEXT_HOST_DEVICE static V over_derivative(Nonlinearity a, V d, V h, T bound) {
    if (a == Nonlinearity::tanh) {
      const V kept = clamp(h, bound);
      return d / (1 - kept * kept);
    }
    if (a == Nonlinearity::relu) return h > 0 ? d : V{};
    return d;
  }

  // d * a'(u) / (a'(u)^2 + reg), with tanh's h kept inside +-bound.
  TPEXT_HOST_DEVICE static V over_derivative(Nonlinearity a, V d, V h, T bound, T reg) {
    if (a == Nonlinearity::tanh) {
      const V kept = clamp(h, bound), slope = 1 - kept * kept;
      return d * slope / (slope * slope + reg);
    }
    if (a == Nonlinearity::relu) return h > 0 ? d / (1 + reg) : V{};
    return d / (1 + reg);
  }

  // d times the slope of correction linearized. Without regularisation, the published choice, in as few operations as
  // that takes.
  TPEXT_HOST_DEVICE static V times_slope(Slope slope, Nonlinearity a, V d, V h, T bound, T reg) {
    if (slope == Slope::one) return d;
    if (slope == Slope::derivative) return times_derivative(a, d, h);
    return reg == 0 ? over_derivative(a, d, h, bound) : over_derivative(a, d, h, bound, reg);
  }

  // a^-1(v), with tanh's v kept inside +-bound and relu's above zero.
  TPEXT_HOST_DEVICE static V inverse_activate(Nonlinearity a, V v, T bound) {
    if (a == Nonlinearity::tanh) {
      const V kept = clamp(v, bound);
      return Math::half_log_ratio(1 + kept, 1 - kept, kept + kept);
    }
    if (a == Nonlinearity::relu) return v < 0 ? V{} : v;
    return v;
  }

  // a^-1(h + d) - a^-1(h), without cancellation however small d is: where no bound is touched the displacement itself
  // enters, not the rounded difference of the two.
  TPEXT_HOST_DEVICE static V inverse_difference(Nonlinearity a, V h, V d, T bound) {
    const V v = h + d;
    if (a == Nonlinearity::tanh) {
      const V kept_v = clamp(v, bound), kept_h = clamp(h, bound);
      const V difference = (kept_v == v) & (kept_h == h) ? d : kept_v - kept_h;
      return Math::half_log_ratio((1 + kept_v) * (1 - kept_h), (1 - kept_v) * (1 + kept_h), difference + difference);
    }
    if (a == Nonlinearity::relu) return h < 0 ? (v < 0 ? V{} : v) : (v < 0 ? 0 - h : d);
    return d;
  }

  // tanh(q + a) - tanh(q) = tanh(a) (1 - tanh(q) tanh(q + a)), which keeps the precision of a small a.
  TPEXT_HOST_DEVICE static V tanh_difference(V q, V a) {
    return Math::tanh(a) * (1 - Math::tanh(q) * Math::tanh(q + a));
  }

 private:
  TPEXT_HOST_DEVICE static V clamp(V v, T bound) {
    v = v > bound ? filled(bound) : v;
    return v < -bound ? filled(-bound) : v;
  }

  TPEXT_HOST_DEVICE static V filled(T value) {
    if constexpr (std::is_same_v<V, T>)
      return value;
    else
      return V{} + value;
  }
};

}  // namespace tpext
