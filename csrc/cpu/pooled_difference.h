// What code_difference and probe_difference share: the activations of a pooled layer, the kinds of pools, and shares of
// the work. Definitions and layouts stand in core/pooled_difference.h.
//
// Memory is passed over once: what does not depend on the draw k is read once for all draws, D_k is written once, zeros
// with the rest. Threads take contiguous parts of blocks or planes. A window's value depends on its own elements alone,
// and a plane's positions are written in raster order by one thread: threads and splits of the batch change no bit. An
// index outside its plane is never followed.
#pragma once

#include "core/pooled_difference.h"
#include "cpu/microkernel.h"
#include "cpu/threads.h"
#include "cpu/windows.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Fewer elements of D than this are not worth a second thread.
constexpr int64_t kGrain = 16384;

// Below -elu and outside +-tanh a is constant in T's precision: multiples of ln 2 from where the rest is half a unit.
template <class T>
struct Flat;
template <>
struct Flat<float> {
  static constexpr float elu = 17.328679f, tanh = 9.010913f;
};
template <>
struct Flat<double> {
  static constexpr double elu = 37.429947750237048, tanh = 19.061547465398496;
};

// Kept to where a rises; of a vector or a number. NaN passes.
template <Activation A, class T, class V>
inline V keep(V v) {
  if constexpr (A == Activation::elu) return v < -Flat<T>::elu ? V{} - Flat<T>::elu : v;
  if constexpr (A == Activation::relu) return v < 0 ? V{} : v;
  if constexpr (A == Activation::tanh) {
    v = v < -Flat<T>::tanh ? V{} - Flat<T>::tanh : v;
    return v > Flat<T>::tanh ? V{} + Flat<T>::tanh : v;
  }
  if constexpr (A == Activation::identity) return v;
}

// Always inline: else it depends on what else is in a file.
template <Activation A, class T>
[[gnu::always_inline]] inline Vec<T> activate(Vec<T> v, T alpha) {
  if constexpr (A == Activation::elu) {
    using C = Constants<T>;
    const Vec<T> x = keep<A, T>(v < 0 ? v : Vec<T>{});
    const Vec<T> shifted = x * T(1.4426950408889634) + C::round;
    const Vec<T> n = shifted - C::round;
    const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
    const Vec<T> p = (r * r) * horner(r, C::expm1) + r;
    const Vec<T> scale = power_of_two<T>((Unsigned<T>)shifted);
    return v < 0 ? (p * scale + (scale - T(1))) * alpha : v;
  }
  if constexpr (A == Activation::relu) return v < 0 ? Vec<T>{} : v;
  if constexpr (A == Activation::tanh) return tanh<T>(v);
  if constexpr (A == Activation::identity) return v;
}

template <Activation A>
struct Chosen {
  static constexpr Activation value = A;
};

// run(Chosen<activation>())
template <class Run>
inline void with_activation(Activation activation, Run run) {
  switch (activation) {
    case Activation::elu: return run(Chosen<Activation::elu>());
    case Activation::relu: return run(Chosen<Activation::relu>());
    case Activation::tanh: return run(Chosen<Activation::tanh>());
    case Activation::identity: return run(Chosen<Activation::identity>());
  }
}

// run(Shift<s>()) for the s of PackedWindows that fits the pool; false where none does.
template <int S>
struct Shift {
  static constexpr int value = S;
};
template <class T, int S = 1, class Run>
inline bool with_packed(const Pool& pool, Run run) {
  if constexpr ((1 << S) <= 2 * kLanes<T>) {
    if (pool.width == 1 << S) {
      run(Shift<S>());
      return true;
    }
    return with_packed<T, S + 1>(pool, run);
  }
  return false;
}

// Whether each element is in one of 2 x 2 windows.
inline bool is_even(const Pool& pool) {
  return pool.kernel == 2 && pool.stride == 2 && pool.padding == 0 && pool.height % 2 == 0 && pool.width % 2 == 0;
}

// run(begin, end) of the calling thread's part of `units`, which make up `elements` of D.
template <class Run>
inline void in_parts(int64_t units, int64_t elements, int max_threads, Run run) {
  const int64_t most = elements / kGrain + 1;
  const int threads = most < max_threads ? static_cast<int>(most) : max_threads;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = thread_index(), team = thread_count();
    run(part_begin(units, team, thread), part_begin(units, team, thread + 1));
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
