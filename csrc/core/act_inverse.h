// What the kernel of the regularised inverse of an activation needs to know: sizes, numbers and pointers.
#pragma once

#include <cstdint>

namespace tpext {

// x = scale * argmin_u (tanh u - y)^2 + g (u - c)^2, elementwise, for y = scale * target - (scale - 1) and c = input /
// scale. For tanh scale is 1 and g is reg; sigmoid(x) = (1 + tanh(x / 2)) / 2, so it has 2 and 16 reg.
// As a displacement it is x - input, for y = tanh c + scale * target.
template <class T>
struct ActInverse {
  int64_t count;
  T scale;
  T pull, spring;   // 1 / max(1, g) and g / max(1, g)
  T reach;          // 1 / max(g, sqrt(g))
  T inward;         // 3/4 sqrt(g)
  T half_log;       // log(4 / g) / 2
  const T* target;  // [count]
  const T* input;   // [count]
  T* output;        // [count]
  bool displacement;
};

}  // namespace tpext
