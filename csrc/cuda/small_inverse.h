// Gauss-Jordan elimination of small matrices (regularized_inverse.cu): a group of lanes a matrix.
//
// m <= 32: a group of N = 8, 16 or 32 lanes a matrix, 128 threads a block. Lane c holds column c of A and of X in
//   registers. A step hands column j from its lane to the others through shared memory (two buffers, one warp barrier).
//   Registers shift by one a step, so that the pivot row always stands first and the loop need not be unrolled. A step
//   takes 70 + 3 N cycles (N stores and loads by fours, 2 N multiply-adds; 40 for the reciprocal).
//
// Shared memory: (N + 6) (N + 4) numbers a matrix.
#pragma once

#include "cuda/elimination.h"

namespace tpext::cuda {
namespace {

constexpr int kSmallThreads = 128;

// One of the matrices of a block: its lane's column of A and of X.
template <class T, int N>
struct Small {
  static constexpr int kMatrices = kSmallThreads / N;  // of a block
  static constexpr int kStride = N + kVector<T>;       // of B's rows: the lanes' reads of their own rows do not collide
  static constexpr int kNumbers = N * kStride + 2 * N;
  static constexpr int kSharedBytes = kMatrices * kNumbers * static_cast<int>(sizeof(T));

  // After `steps` shifts slot i holds this row.
  TPEXT_HOST_DEVICE static int row(int i, int steps) { return i + steps < N ? i + steps : i + steps - N; }

  T* staged;   // [N, stride] B
  T* columns;  // [2, N]: the pivot's column
  int lane;
  T a[N], x[N];

  __device__ Small(T* shared, int group)
      : staged(shared + group * kNumbers), columns(staged + N * kStride), lane(thread_index() % N) {}

  // B to shared memory, with zeros around it and for a matrix that is not there. Returns the lane's part of a sum that
  // is zero if all of B is finite.
  __device__ __forceinline__ T stage(const T* weight, const Sizes& sizes, int lines, int length, bool present) {
    const int of_line = sizes.tall ? kStride : 1, of_lane = sizes.tall ? 1 : kStride;
    T check = T(0);
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] = present && i < lines && lane < length ? weight[i * length + lane] : T(0);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      check += a[i] * T(0);
      staged[i * of_line + lane * of_lane] = a[i];
    }
    warp_barrier();
    return check;
  }

  // [A B'] from B.
  __device__ __forceinline__ void prepare(int terms, T reg) {
    load_packs<N>(staged + lane * kStride, x);
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] = T(0);
#pragma unroll 2
    for (int t = 0; t < terms; ++t) {
      const T own = staged[t * kStride + lane];
      T row[N];
      load_packs<N>(staged + t * kStride, row);
#pragma unroll
      for (int i = 0; i < N; ++i) a[i] += row[i] * own;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i == lane) a[i] += reg;
  }

  // Returns whether it came to its end.
  __device__ __forceinline__ bool eliminate(int order) {
    bool regular = true;
#pragma unroll 1
    for (int j = 0; j < order; ++j) {
      T* const column = columns + j % 2 * N;
      if (lane == j) store_packs<N>(a, column);
      warp_barrier();
      T factor[N];
      load_packs<N>(column, factor);
      regular = regular && usable(factor[0]);
      const T reciprocal = T(1) / factor[0], pivot_a = a[0] * reciprocal, pivot_x = x[0] * reciprocal;
#pragma unroll
      for (int i = 1; i < N; ++i) {
        a[i - 1] = a[i] - factor[i] * pivot_a;
        x[i - 1] = x[i] - factor[i] * pivot_x;
      }
      a[N - 1] = pivot_a;
      x[N - 1] = pivot_x;
    }
    return regular;
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kSmallThreads)
    invert_small(const __grid_constant__ RegularizedInverse<T> args, T reg) {
  using Result = RegularizedInverse<T>;
  const Sizes sizes(args.rows, args.columns);
  const int group = thread_index() / N;
  const int64_t matrix = static_cast<int64_t>(block_index()) * Small<T, N>::kMatrices + group;
  if (matrix - group % (kWarp / N) >= args.batch) return;
  // A group without a matrix computes with zeros: collectives need the whole warp.
  const bool present = matrix < args.batch;
  Small<T, N> small(reinterpret_cast<T*>(shared_memory()), group);
  T check = small.stage(args.weight + matrix * sizes.size(), sizes, static_cast<int>(args.rows),
                        static_cast<int>(args.columns), present);
  small.prepare(sizes.terms, reg);
  const bool regular = small.eliminate(sizes.order);
#pragma unroll
  for (int mask = N / 2; mask > 0; mask /= 2) check += shuffle_xor(check, mask);
  if (!present) return;
  T* const inverse = args.inverse + matrix * sizes.size();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int row = small.row(i, sizes.order);
    if (row < sizes.order && small.lane < sizes.terms)
      inverse[sizes.in_inverse(row, small.lane)] = regular ? small.x[i] : kNaN<T>;
  }
  if (small.lane == 0)
    args.status[matrix] = regular ? Result::ok : check == T(0) ? Result::singular : Result::not_finite;
}

}  // namespace
}  // namespace tpext::cuda
