#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace tpext::cpu {

// Each instruction set's objects define their functions in a namespace of its own (see simd.h).
#define TPEXT_DECLARE(name)                                          \
  namespace name {                                                   \
  void act_inverse(const ActInverse<float>&, int);                   \
  void act_inverse(const ActInverse<double>&, int);                  \
  void code_difference(const CodeDifference<float>&, int);           \
  void code_difference(const CodeDifference<double>&, int);          \
  void counter_normal(const CounterNormal<float>&, int);             \
  void counter_normal(const CounterNormal<double>&, int);            \
  void kaczmarz_step(const KaczmarzStep<float>&, int);               \
  void kaczmarz_step(const KaczmarzStep<double>&, int);              \
  void kaczmarz_train(const KaczmarzTrain<float>&);                  \
  void kaczmarz_train(const KaczmarzTrain<double>&);                 \
  void probe_difference(const ProbeDifference<float>&, int);         \
  void probe_difference(const ProbeDifference<double>&, int);        \
  void regularized_inverse(const RegularizedInverse<float>&, int);   \
  void regularized_inverse(const RegularizedInverse<double>&, int);  \
  void regularized_solve(const RegularizedSolve<float>&, int);       \
  void regularized_solve(const RegularizedSolve<double>&, int);      \
  void rnn_layer_backward(const RnnLayerBackward<float>&, int);      \
  void rnn_layer_backward(const RnnLayerBackward<double>&, int);     \
  void rnn_scan(const RnnScan<float>&, int);                         \
  void rnn_scan(const RnnScan<double>&, int);                        \
  void rnn_target_scan(const RnnTargetScan<float>&, int);            \
  void rnn_target_scan(const RnnTargetScan<double>&, int);           \
  void rnn_weight_gradients(const RnnWeightGradients<float>&, int);  \
  void rnn_weight_gradients(const RnnWeightGradients<double>&, int); \
  constexpr Kernels table = {#name,                                  \
                             act_inverse,                            \
                             act_inverse,                            \
                             code_difference,                        \
                             code_difference,                        \
                             counter_normal,                         \
                             counter_normal,                         \
                             kaczmarz_step,                          \
                             kaczmarz_step,                          \
                             kaczmarz_train,                         \
                             kaczmarz_train,                         \
                             probe_difference,                       \
                             probe_difference,                       \
                             regularized_inverse,                    \
                             regularized_inverse,                    \
                             regularized_solve,                      \
                             regularized_solve,                      \
                             rnn_layer_backward,                     \
                             rnn_layer_backward,                     \
                             rnn_scan,                               \
                             rnn_scan,                               \
                             rnn_target_scan,                        \
                             rnn_target_scan,                        \
                             rnn_weight_gradients,                   \
                             rnn_weight_gradients};                  \
  }

TPEXT_DECLARE(baseline)
#ifdef TPEXT_X86
TPEXT_DECLARE(avx2)
TPEXT_DECLARE(avx512)
#endif
#undef TPEXT_DECLARE

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
