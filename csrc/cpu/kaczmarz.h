// What kaczmarz_step and kaczmarz_train share.
#pragma once

#include "core/kaczmarz.h"
#include "cpu/microkernel.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Comparisons here are written to let NaN pass.
template <class T>
inline Vec<T> relu(Vec<T> v) {
  return v < 0 ? Vec<T>{} : v;
}

// In one order, whatever the vectors came from.
template <class T>
inline T total(Vec<T> v) {
  T sum = v[0];
  for (int i = 1; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

template <class T>
inline int64_t whole_vectors(int64_t count) {
  return ceil_div(count, kLanes<T>) * kLanes<T>;
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
