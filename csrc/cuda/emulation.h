// What cuda/device.h declares, for kernels compiled as plain C++: the threads of a launch run as fibers on the CPU, one
// at a time, under a schedule that a seed permutes. "Device memory" is host memory.
//
// Blocks of a cluster run together, and so do all blocks of a cooperative launch; other blocks run one after another.
// A block's shared memory holds NaNs when it starts and ends at an inaccessible page. Collectives check that the
// threads that must take part do: a launch that hardware could hang on or compute wrongly with is aborted, and launch()
// throws a CudaError that says which thread waited for what.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/low_precision.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace tpext::cuda {

constexpr int kWarp = 32;

// Seed of the schedules of the launches to come. 0: threads and blocks in ascending order, each runs until it has to
// wait. Others: an order drawn anew at every round, with threads, warps and blocks held back at random. The environment
// variable TPEXT_EMULATION_SEED sets it at the start.
void set_emulation_seed(uint64_t seed);

// What limits() gives from now on. A call of the tests, between launches.
struct Limits;
void set_emulated_limits(const Limits& limits);

namespace detail {

struct Thread {
  int index;
  int block;
  char* shared;
};
extern const Thread* running;

// Calls of the functions below until the running thread is interrupted; never comes to zero with seed 0.
extern int64_t until_interruption;
void interrupt();
inline void may_interrupt() {
  if (--until_interruption == 0) interrupt();
}

enum class Wait : uint8_t {
  none,
  block_barrier,
  warp_barrier,
  shuffle,
  shuffle_wide,
  shuffle_xor,
  shuffle_xor_wide,
  mma_bfloat16,
  mma_float16,
  cluster_wait,
  spin,
  ended,
};

uint64_t exchange(Wait kind, uint64_t bits, int source);
void multiply(Wait kind, float* c, const uint32_t* a, const uint32_t* b);
void* in_cluster(void* shared, int rank);
void made_progress();

template <class T>
T shuffle(Wait kind, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a register or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(kind, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace detail

inline int thread_index() {
  detail::may_interrupt();
  return detail::running->index;
}
inline int block_index() {
  detail::may_interrupt();
  return detail::running->block;
}
inline char* shared_memory() {
  detail::may_interrupt();
  return detail::running->shared;
}

void block_barrier();
void warp_barrier();

template <class T>
T shuffle_xor(T value, int mask) {
  return detail::shuffle(sizeof(T) == 4 ? detail::Wait::shuffle_xor : detail::Wait::shuffle_xor_wide, value,
                         (detail::running->index % kWarp) ^ mask);
}
template <class T>
T shuffle(T value, int lane) {
  return detail::shuffle(sizeof(T) == 4 ? detail::Wait::shuffle : detail::Wait::shuffle_wide, value, lane);
}

void cluster_arrive();
void cluster_wait();

template <class T>
T* in_cluster(T* shared, int rank) {
  return static_cast<T*>(detail::in_cluster(const_cast<std::remove_cv_t<T>*>(shared), rank));
}

inline void add_release(uint32_t* counter, uint32_t value) {
  detail::may_interrupt();
  detail::made_progress();
  __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
}
inline uint32_t load_acquire(const uint32_t* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }
void spin();

struct alignas(16) Words {
  unsigned values[4];
};
inline Words load_shared_by_grid(const Words* at) {
  detail::may_interrupt();
  return *at;
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16) {
  detail::multiply(detail::Wait::mma_bfloat16, c, a, b);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
  detail::multiply(detail::Wait::mma_float16, c, a, b);
}

}  // namespace tpext::cuda
