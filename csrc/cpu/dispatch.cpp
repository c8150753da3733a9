#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace tpext::cpu {

// Each instruction set's objects define their functions in a namespace of its own (see simd.h), and a table of them.
namespace baseline {
extern const Kernels table;
}
#ifdef TPEXT_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

struct Candidate {
  const Kernels* table;
  bool supported;
};

#ifdef TPEXT_X86
constexpr int kCount = 3;
#else
constexpr int kCount = 1;
#endif

const Candidate* candidates() {
  static const Candidate all[kCount] = {
      {&baseline::table, true},
#ifdef TPEXT_X86
      {&avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&avx512::table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")},
#endif
  };
  return all;
}

const Kernels& choose() {
  const Candidate* all = candidates();
  const char* wanted = std::getenv("TPEXT_CPU_CAPABILITY");
  std::string names;
  for (int i = kCount - 1; i >= 0; --i) {
    if (wanted == nullptr || *wanted == '\0') {
      if (all[i].supported) return *all[i].table;
    } else if (std::strcmp(wanted, all[i].table->capability) == 0) {
      if (all[i].supported) return *all[i].table;
      throw std::runtime_error(std::string("TPEXT_CPU_CAPABILITY=") + wanted + ": this processor does not support it");
    }
    names = std::string(all[i].table->capability) + (names.empty() ? "" : ", ") + names;
  }
  throw std::runtime_error(std::string("TPEXT_CPU_CAPABILITY must be one of ") + names + ", got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* const* compiled_capabilities() {
  static const char* names[kCount + 1] = {};
  for (int i = 0; i < kCount; ++i) names[i] = candidates()[i].table->capability;
  return names;
}

}  // namespace tpext::cpu
