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
  bool all_zero() const {
    for (int64_t i = 0; i < count; ++i)
      if (values[i] != T(0)) return false;
    return true;
  }
};

}  // namespace tpext
