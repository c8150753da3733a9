// Of the kernels' own tools, what no entry of the module shows: test_native.py compiles it, with the sanitizer that
// stops at undefined behaviour, and runs it with the name of a check. Exit status 0: passed.
#include <cstdio>
#include <cstring>

#define TPEXT_CAPABILITY baseline
#define TPEXT_VECTOR_BYTES 16
#include "cpu/simd.h"

using namespace tpext::cpu::baseline;

namespace {

bool all_passed = true;

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("failed: %s\n", what);
  all_passed = false;
}

template <class T>
void lanes_without_numbers() {
  const volatile T nan = static_cast<T>(__builtin_nan("")), infinity = static_cast<T>(__builtin_inf()),
                   minus_zero = T(-0.0);
  for (const T value : {T(nan), -T(nan), T(infinity), -T(infinity), T(minus_zero)}) {
    const Vec<T> v = Vec<T>{} + value;
    const T tanh_v = tanh<T>(v)[0], ratio = half_log_ratio<T>(v, Vec<T>{} + T(1), v)[0], atanh_v = atanh<T>(v)[0];
    if (value != value) expect(tanh_v != tanh_v && ratio != ratio && atanh_v != atanh_v, "NaN stays NaN");
  }
}

}  // namespace

int main(int count, char** names) {
  const auto wanted = [&](const char* name) { return count > 1 && std::strcmp(names[1], name) == 0; };
  if (wanted("lanes_without_numbers")) {
    lanes_without_numbers<float>();
    lanes_without_numbers<double>();
  } else {
    return 2;
  }
  return all_passed ? 0 : 1;
}
