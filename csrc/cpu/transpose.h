// Transposition of a square of vectors, and of panels one vector wide through it.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Lane i of the result is element I_i of a and b put end to end.
template <class T, int... I>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Bits<T>{I...});
#endif
}

// Elements start, start + 1, ... of a and b in turn.
template <class T, int Start, int... I>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T>(a, b, std::integer_sequence<int, (Start + I / 2 + I % 2 * kLanes<T>)...>());
}

// Transposes a square of L vectors: each of log2(L) perfect shuffles of its L^2 elements turns their index by one bit.
template <class T>
[[gnu::always_inline]] inline void transpose(Vec<T> (&square)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  constexpr std::make_integer_sequence<int, L> lanes;
#pragma GCC unroll 4
  for (int turns = 1; turns < L; turns *= 2) {
    Vec<T> turned[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      turned[2 * i] = interleave<T, 0>(square[i], square[i + L / 2], lanes);
      turned[2 * i + 1] = interleave<T, L / 2>(square[i], square[i + L / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = turned[i];
  }
}

// A panel of the transposed of from [rows, depth], rows <= L: panel[k][r] = from[r][k]; the lanes beyond are zero.
template <class T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t depth, T* panel) {
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < depth; k += L) {
    const int64_t count = depth - k < L ? depth - k : L;
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) square[r] = r < rows ? load_part(from + r * stride + k, count) : Vec<T>{};
    transpose<T>(square);
    for (int i = 0; i < count; ++i) store(panel + (k + i) * L, square[i]);
  }
}

// The way back: to[r][k] = panel[k][r].
template <class T>
void unpack_transposed(const T* panel, int64_t rows, int64_t depth, T* to, int64_t stride) {
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < depth; k += L) {
    const int64_t count = depth - k < L ? depth - k : L;
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = i < count ? load(panel + (k + i) * L) : Vec<T>{};
    transpose<T>(square);
    for (int r = 0; r < rows; ++r) store_part(to + r * stride + k, square[r], count);
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
