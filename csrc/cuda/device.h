// What kernels may use of a GPU: the only header here whose text differs between nvcc and the emulation.
//
// Kernels are written against these functions alone. Compiled by nvcc they are the hardware's; with
// TPEXT_CUDA_EMULATION the same kernels are plain C++ and cuda/emulation.h runs their threads as fibers on the CPU, so
// that every kernel runs whole in tests on a machine without a GPU.
#pragma once

#include <cstdint>

#include "core/low_precision.h"

#ifdef TPEXT_CUDA_EMULATION
#include "cuda/emulation.h"
#else

#include <cuda_runtime.h>

namespace tpext::cuda {

constexpr int kWarp = 32;

__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ inline int block_index() { return static_cast<int>(blockIdx.x); }

// The block's dynamic shared memory, 16-byte aligned. Its content is undefined at the start.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ inline void block_barrier() { __syncthreads(); }
__device__ inline void warp_barrier() { __syncwarp(); }

// The value of the lane whose number differs by `mask`, or of one lane. All 32 lanes take part.
template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
__device__ inline T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Barrier among the blocks of a cluster in two halves: what a thread wrote before its arrival, to any block's shared
// memory, is seen by every thread after its wait. All threads take part.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The same place in the shared memory of the cluster's block `rank`.
template <class T>
__device__ inline T* in_cluster(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  (void)rank;
  return shared;
#endif
}

// Counter in global memory that blocks synchronise by: what the thread wrote before, and what its block wrote before a
// barrier that precedes, is seen by whoever reads the new count.
__device__ inline void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ inline uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
// Between two reads of a counter that has not changed.
__device__ inline void spin() {}

// Global memory as other blocks of this launch wrote it: past the multiprocessor's own cache.
struct alignas(16) Words {
  unsigned values[4];
};
__device__ inline Words load_shared_by_grid(const Words* at) {
  const uint4 words = __ldcg(reinterpret_cast<const uint4*>(at));
  return {{words.x, words.y, words.z, words.w}};
}

// c += a b of one warp's 16x16 by 16x8 tile, fragments as PTX's mma.m16n8k16 lays them out; two values a register, the
// lower index in the lower half. Lane = 4 g + q holds
//   a[0]: (row g, k 2q..2q+1)  a[1]: (row g + 8, same k)  a[2]: (row g, k + 8)  a[3]: (row g + 8, k + 8)
//   b[0]: (k 2q..2q+1, column g)  b[1]: (k + 8, same column)
//   c[0..1]: (row g, column 2q..2q+1)  c[2..3]: (row g + 8, same columns)
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace tpext::cuda

#endif
