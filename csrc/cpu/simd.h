// Vectors of one instruction set, and the functions on them that the recurrent kernels need.
//
// Every file that includes this one is compiled once for each instruction set, with flags of its own and two macros:
// TPEXT_CAPABILITY names the set and the namespace, TPEXT_VECTOR_BYTES is the width of a register. Vectors are those of
// GCC's and Clang's language extension, so the source has no intrinsics and the baseline builds on any architecture.
// Everything but the kernels' entry points stands in an unnamed namespace, and no inline function of the standard
// library is used: the linker could otherwise keep the AVX-512 copy of a shared symbol and call it on a machine
// without.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(TPEXT_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(TPEXT_VECTOR_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(TPEXT_VECTOR_BYTES)));
};

template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(TPEXT_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(TPEXT_VECTOR_BYTES)));
  typedef uint64_t Unsigned __attribute__((vector_size(TPEXT_VECTOR_BYTES)));
};

template <class T>
using Vec = typename Lanes<T>::Vec;

template <class T>
using Bits = typename Lanes<T>::Bits;

// Bits to calculate with: in lanes that hold NaN, or nothing of use, sums overflow.
template <class T>
using Unsigned = typename Lanes<T>::Unsigned;

template <class T>
constexpr int kLanes = TPEXT_VECTOR_BYTES / static_cast<int>(sizeof(T));

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// The first `count` < lanes elements, in pieces of constant size: a memcpy of variable size would be a call.
template <class T>
inline void copy_part(T* to, const T* from, int64_t count) {
  if constexpr (kLanes<T> > 8) {
    if (count & 8) std::memcpy(to, from, 8 * sizeof(T)), to += 8, from += 8;
  }
  if constexpr (kLanes<T> > 4) {
    if (count & 4) std::memcpy(to, from, 4 * sizeof(T)), to += 4, from += 4;
  }
  if constexpr (kLanes<T> > 2) {
    if (count & 2) std::memcpy(to, from, 2 * sizeof(T)), to += 2, from += 2;
  }
  if (count & 1) *to = *from;
}

// The address of an element that may lie outside the array: for prefetching only.
template <class T>
inline uintptr_t address(const T* array, int64_t offset) {
  return reinterpret_cast<uintptr_t>(array) + static_cast<uintptr_t>(offset * int64_t{sizeof(T)});
}

inline void prefetch(uintptr_t at) { __builtin_prefetch(reinterpret_cast<const char*>(at)); }

template <class T>
[[gnu::noinline]] Vec<T> load_few(const T* from, int64_t count) {
  alignas(TPEXT_VECTOR_BYTES) T lanes[kLanes<T>] = {};
  copy_part(lanes, from, count);
  return load(lanes);
}

template <class T>
[[gnu::noinline]] void store_few(T* to, const Vec<T>& v, int64_t count) {
  alignas(TPEXT_VECTOR_BYTES) T lanes[kLanes<T>];
  store(lanes, v);
  copy_part(to, lanes, count);
}

// The first `count` lanes; the others are zero. Short vectors come only with rows shorter than a vector.
template <class T>
inline Vec<T> load_part(const T* from, int64_t count) {
  return __builtin_expect(count >= kLanes<T>, 1) ? load(from) : load_few(from, count);
}

template <class T>
inline void store_part(T* to, Vec<T> v, int64_t count) {
  if (__builtin_expect(count >= kLanes<T>, 1))
    store(to, v);
  else
    store_few(to, v, count);
}

// Whether a number other than zero is among those whose bits were joined by "or".
template <class T>
inline bool any_nonzero(Bits<T> joined) {
  typename std::remove_reference<decltype(joined[0])>::type bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= joined[i];
  return (bits << 1) != 0;
}

// All ones where v is NaN or infinite.
template <class T>
inline Bits<T> not_finite(Vec<T> v) {
  return (Bits<T>)(v - v != 0);
}

template <class T>
struct Constants;

// Polynomials are minimax fits: `expm1` of (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, relative error of e^r - 1
// below 1.4e-8 (float) and 1.8e-17 (double); `atanh` of (atanh(s) - s) / s^3 in s^2 on |s| <= 3 - 2 sqrt(2), below 1e-9
// and 1e-20. `round` is 1.5 * 2^(mantissa bits): adding it rounds to an integer that then stands in the low bits.
template <>
struct Constants<float> {
  static constexpr float round = 12582912.0f;
  static constexpr int mantissa = 23;
  static constexpr uint32_t one = 0x3f800000;
  static constexpr uint32_t half_sqrt = 0x3f3504f3;  // sqrt(1/2)
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.428606765330187e-06f;
  static constexpr float largest = 3.40282347e+38f;
  static constexpr float tanh_is_one = 10.0f;
  static constexpr float largest_exponent = 88.0f;
  static constexpr float expm1[] = {0.5000000062094943f, 0.16666542744505265f, 0.0416662813046362f,
                                    0.008366610565732947f, 0.0013946504293418573f};
  static constexpr float atanh[] = {0.3333338852690188f, 0.1998872472787031f, 0.14937210508628772f};
};

template <>
struct Constants<double> {
  static constexpr double round = 6755399441055744.0;
  static constexpr int mantissa = 52;
  static constexpr uint64_t one = 0x3ff0000000000000;
  static constexpr uint64_t half_sqrt = 0x3fe6a09e667f3bcd;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double largest = 1.7976931348623157e308;
  static constexpr double tanh_is_one = 20.0;
  static constexpr double largest_exponent = 709.0;
  static constexpr double expm1[] = {0.50000000000000055723,     0.1666666666666668607,    0.04166666666657332677,
                                     0.0083333333333145326823,   0.001388888893248325011,  0.00019841269903185362138,
                                     0.000024801504313320734711, 2.7557227793672741707e-6, 2.7626381764352125578e-7,
                                     2.5114529986079869588e-8};
  static constexpr double atanh[] = {0.33333333333333330443, 0.20000000000003166103, 0.14285714284529229498,
                                     0.11111111325472163135, 0.09090887666127991362, 0.076935526945762098976,
                                     0.06624893425171774322, 0.066271769668793569937};
};

// 2^n of the integer n in the low bits of each lane.
template <class T>
inline Vec<T> power_of_two(Unsigned<T> n) {
  return (Vec<T>)((n << Constants<T>::mantissa) + Constants<T>::one);
}

template <class T, int N>
inline Vec<T> horner(Vec<T> x, const T (&coefficients)[N]) {
  Vec<T> sum = Vec<T>{} + coefficients[N - 1];
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// e^y = 2^n e^r, |r| <= ln(2)/2: e^r - 1 and 2^n, for |y| up to largest_exponent.
template <class T>
struct Exponential {
  Vec<T> fraction, scale;
};

template <class T>
inline Exponential<T> exponential(Vec<T> y) {
  using C = Constants<T>;
  const Vec<T> shifted = y * T(1.4426950408889634) + C::round;
  const Vec<T> n = shifted - C::round;
  const Vec<T> r = (y - n * C::ln2_high) - n * C::ln2_low;
  return {(r * r) * horner(r, C::expm1) + r, power_of_two<T>((Unsigned<T>)shifted)};
}

// tanh(x) = m / (m + 2), m = e^(2|x|) - 1 = 2^n (e^r - 1) + (2^n - 1), with the sign of x. One division, no branch, no
// cancellation; within 2 ulp (2.2 without fused multiply-add), odd, exact at zero and infinity. NaN stays NaN:
// comparisons are written to let it pass.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  using C = Constants<T>;
  const Bits<T> sign = (Bits<T>)x & (Bits<T>)(-Vec<T>{});
  Vec<T> y = (Vec<T>)((Bits<T>)x & ~sign);
  y = y > C::tanh_is_one ? Vec<T>{} + C::tanh_is_one : y;
  const auto [p, scale] = exponential<T>(y + y);
  const Vec<T> m = p * scale + (scale - T(1));
  const Vec<T> q = m + T(2);
  const Vec<T> t = m / q;
  // One Newton step on t q = m with q's own rounding error counted in, and 1 / q = (1 - t) / 2; where t is close to 1
  // the latter is lost to rounding, and the step is not needed. Without fused multiply-add m - t q would be rounding
  // alone.
  const Vec<T> residual = (kFused ? m - t * q : Vec<T>{}) - t * (m - (q - T(2)));
  const Vec<T> refined = m > T(32) ? t : residual * (T(0.5) - T(0.5) * t) + t;
  return (Vec<T>)((Bits<T>)refined | sign);
}

// 1 / (1 + e^-x), relative to its size within 2 ulp (2.5 without fused multiply-add) until e^x underflows. NaN stays
// NaN.
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  using C = Constants<T>;
  Vec<T> y = -x;
  y = y > C::largest_exponent ? Vec<T>{} + C::largest_exponent : y;
  y = y < -C::largest_exponent ? Vec<T>{} - C::largest_exponent : y;
  const auto [p, scale] = exponential<T>(y);
  return T(1) / ((p * scale + scale) + T(1));
}

// A product that is rounded: no sum that it goes into is fused with it. Of a sum of two products one is to be like
// this, or the compiler has the choice.
template <class T>
inline Vec<T> rounded_product(Vec<T> a, Vec<T> b) {
  Vec<T> v = a * b;
#if defined(__FMA__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// 1/2 log(p / q) for positive p, q, given p - q to its own full precision: with p / q = 2^n s', s' in [sqrt(1/2),
// sqrt(2)], it is n ln(2)/2 + atanh((p - 2^n q) / (p + 2^n q)). For n = 0 the numerator is the given difference, so
// nothing is lost when p and q are close.
template <class T>
inline Vec<T> half_log_ratio(Vec<T> p, Vec<T> q, Vec<T> p_minus_q) {
  using C = Constants<T>;
  const Bits<T> n = (Bits<T>)((Unsigned<T>)(p / q) - C::half_sqrt) >> C::mantissa;
  const Vec<T> scale = power_of_two<T>((Unsigned<T>)n);
  const Vec<T> exponent = (Vec<T>)((Unsigned<T>)n + (Unsigned<T>)(Vec<T>{} + C::round)) - C::round;
  const Vec<T> numerator = n == 0 ? p_minus_q : p - scale * q;
  const Vec<T> s = numerator / (scale * q + p);
  const Vec<T> w = s * s;
  const Vec<T> series = (w * horner(w, C::atanh)) * s + s;
  return exponent * T(0.34657359027997264) + series;
}

// Subnormal operands cost some processors a hundred cycles each, and a displacement that shrinks geometrically spends
// hundreds of steps among them before it is zero. While this lives, the thread takes them for zero; then its control
// word is restored.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
