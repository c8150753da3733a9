// What both ways to invert a matrix on CUDA share (regularized_inverse.cu).
#pragma once

#include <limits>

#include "cuda/kernels.h"

namespace tpext::cuda {
namespace {

template <class T>
constexpr int kVector = 16 / sizeof(T);
template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// One access of 16 bytes.
template <class T>
struct alignas(16) Pack {
  T value[kVector<T>];
};

template <int Count, class T>
__device__ inline void load_packs(const T* from, T (&to)[Count]) {
  static_assert(Count % kVector<T> == 0);
#pragma unroll
  for (int i = 0; i < Count; i += kVector<T>) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) to[i + v] = pack.value[v];
  }
}

template <int Count, class T>
__device__ inline void store_packs(const T (&from)[Count], T* to) {
  static_assert(Count % kVector<T> == 0);
#pragma unroll
  for (int i = 0; i < Count; i += kVector<T>) {
    Pack<T> pack;
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) pack.value[v] = from[i + v];
    *reinterpret_cast<Pack<T>*>(to + i) = pack;
  }
}

// B [m, k] and R of one matrix.
struct Sizes {
  bool tall;    // N <= M: B = W
  int order;    // k
  int terms;    // m
  int of_term;  // distance in R of columns of X
  int of_row;   // distance in R of rows of X

  TPEXT_HOST_DEVICE Sizes(int64_t rows, int64_t columns)
      : tall(columns <= rows),
        order(static_cast<int>(tall ? columns : rows)),
        terms(static_cast<int>(tall ? rows : columns)),
        of_term(tall ? 1 : order),
        of_row(tall ? terms : 1) {}

  TPEXT_HOST_DEVICE int64_t size() const { return static_cast<int64_t>(order) * terms; }
  // Where element (i, t) of X lies in the inverse.
  TPEXT_HOST_DEVICE int in_inverse(int i, int t) const { return i * of_row + t * of_term; }
};

// Whether an elimination can go on: comparisons fail for NaN. A singular matrix without regularisation may pass, with a
// tiny pivot that rounding left: the caller asks of its inverse whether it lost a dimension.
template <class T>
__device__ bool usable(T pivot) {
  return pivot > T(0) && pivot <= kLargest<T>;
}

}  // namespace
}  // namespace tpext::cuda
