// A number that members of a stack may have in common, or each its own.
#pragma once

#include <cstdint>

namespace tpext {

// A number for all members of the stack, or one for each; in the CPU's memory, on every backend.
template <class T>
struct MemberNumber {
  const T* values;
  int64_t count;  // 1 or S

  T of(int64_t member) const { return values[count == 1 ? 0 : member]; }
  int64_t zeros() const {
    int64_t zeros = 0;
    for (int64_t i = 0; i < count; ++i) zeros += values[i] == T(0) ? 1 : 0;
    return zeros;
  }
  bool all_zero() const { return zeros() == count; }
  bool any_zero() const { return zeros() != 0; }
};

}  // namespace tpext
