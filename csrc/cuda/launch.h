// The one place that talks to the CUDA runtime: device guard, stream, limits, launch, error check.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/device.h"

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
  int capability;       // 90 for sm_90
  int multiprocessors;
  int shared_memory;    // bytes of dynamic shared memory that a block can ask for
  bool cooperative;     // can launch grids that synchronise
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
void launch(const void* kernel, const Shape& shape, const Queue& queue, void** arguments);
int resident(const void* kernel, const Shape& shape, int device);
}  // namespace detail

// Enqueues kernel(arguments...) on the queue's stream with its device current, and raises the dynamic shared memory
// limit (and the cluster limit above 8) where the shape asks for it. A launch of no blocks is none. Nothing waits.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, const Queue& queue, Arguments&&... arguments);

// How many clusters (blocks, for clusters of one) of this shape the device holds at once; 0 where it cannot run one.
template <class... Parameters>
int resident(void (*kernel)(Parameters...), const Shape& shape, int device);

}  // namespace tpext::cuda
