// The one place that talks to the CUDA runtime: device guard, stream, limits, launch, error check.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

// A host compiler knows no device code; to call kernels it needs none.
#if defined(__CUDACC__) || defined(TPEXT_CUDA_EMULATION)
#include "cuda/device.h"
#endif

namespace tpext::cuda {

// A failed call of the runtime; the message names the call, the device and what the runtime says.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Where a kernel runs: a device and a stream of it (a cudaStream_t).
struct Queue {
  int device;
  void* stream;
};

// What the choice of a kernel needs to know of a device; read once a device. Throws CudaError without one.
struct Limits {
  int capability;  // 90 for sm_90
  int multiprocessors;
  int shared_memory;  // bytes of dynamic shared memory that a block can ask for
  bool cooperative;   // can launch grids that synchronise
};
const Limits& limits(int device);

struct Shape {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;           // blocks of a cluster; sm_90 where > 1, up to 16
  bool cooperative = false;  // all blocks run at once
};

namespace detail {
#ifdef TPEXT_CUDA_EMULATION
void launch(void (*thread)(const void* call), const void* call, const Shape& shape, const Queue& queue);
int resident(const Shape& shape, int device);
#else
void launch(const void* kernel, void** arguments, const Shape& shape, const Queue& queue);
int resident(const void* kernel, const Shape& shape, int device);
#endif
}  // namespace detail

// Enqueues kernel(arguments...) on the queue's stream with its device current, and raises the dynamic shared memory
// limit (and the cluster limit above 8) where the shape asks for it. A launch of no blocks is none. Nothing waits.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, const Queue& queue, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument a parameter");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "arguments reach the device as bytes");
  std::tuple<std::remove_cv_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
#ifdef TPEXT_CUDA_EMULATION
  const auto call = [kernel, &values] { std::apply(kernel, values); };
  detail::launch([](const void* at) { (*static_cast<decltype(call)*>(at))(); }, &call, shape, queue);
#else
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value..., nullptr};
        detail::launch(reinterpret_cast<const void*>(kernel), pointers, shape, queue);
      },
      values);
#endif
}

// How many clusters (blocks, for clusters of one) of this shape the device holds at once; 0 where it cannot run one.
template <class... Parameters>
int resident([[maybe_unused]] void (*kernel)(Parameters...), const Shape& shape, int device) {
#ifdef TPEXT_CUDA_EMULATION
  return detail::resident(shape, device);
#else
  return detail::resident(reinterpret_cast<const void*>(kernel), shape, device);
#endif
}

}  // namespace tpext::cuda
