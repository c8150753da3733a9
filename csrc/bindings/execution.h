// Where and how a call runs: the last argument of every entry, which has to suit the device of the leading tensor.
#pragma once

#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "cuda/kernels.h"

namespace tpext::bindings {

#ifdef TPEXT_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// By the numbers of cuda::Regime.
inline const std::vector<const char*> kRegimes = {"auto", "block", "cluster", "grid", "step"};

// `value`, an integer, as a number of CPU threads from 1 to 1024.
int threads_of(const char* op, const char* name, const py::object& value);

// Throws in a build without CUDA.
void require_cuda();

// What a step multiplies: so many products of [S, B, in H] to [S, B, out H].
struct StepProducts {
  int64_t count, in, out;
};

class Execution {
 public:
  // `value` is a number of threads for the CPU; for CUDA (stream, regime, workspace), and for the regime "step"
  // (stream, "step", None, number of the step, sums, carried).
  Execution(const char* op, const Argument& leading, const py::object& value);

  bool on_cuda() const { return on_cuda_; }
  int threads() const { return threads_; }
  const cuda::Queue& queue() const { return rnn_.queue; }
  const cuda::RnnExecution& rnn() const { return rnn_; }
  // Checks what a single step of a recurrent call brings, [P, S, B, out H] and [P, S, B, in H].
  void require_step(int64_t steps, const StepProducts& products, const Argument& leading, const Dim& S, const Dim& B,
                    const Dim& H) const;

 private:
  bool on_cuda_ = false;
  int threads_ = 0;
  cuda::RnnExecution rnn_{};
  Argument workspace_, sums_, carried_;
};

// run(T()) with the type that elements of this dtype are stored in: float, double, Bfloat16 or Float16.
template <class Run>
auto with_storage_type(dlpack::DataType dtype, Run run) {
  if (dtype == dlpack::kFloat64) return run(double());
  if (dtype == dlpack::kBfloat16) return run(Bfloat16());
  if (dtype == dlpack::kFloat16) return run(Float16());
  return run(float());
}

}  // namespace tpext::bindings
