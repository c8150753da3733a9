// Gauss-Jordan elimination of larger matrices (regularized_inverse.cu): a block a matrix, or a part of one.
//
// k <= 128 and m <= 128: a block of W warps a matrix or a part of one. Rows go in G groups of 32, of which warp w holds
//   rows 32 / W w .. 32 / W (w + 1) - 1; columns of [A B'] in C groups, of which lane c holds columns c; all in
//   registers. In step j every thread reads row j and column j from shared memory, updates first what holds row j + 1
//   and column j + 1, publishes those and the reciprocal of the next pivot in the second buffer, and updates the rest
//   meanwhile: one barrier a step. Blocks of A below the diagonal are not kept, since A is symmetric where it is not
//   yet eliminated, and groups of columns are dropped once they are eliminated. Few matrices are split by columns of B'
//   over several thread blocks, each of which computes and eliminates all of A: nothing passes between them. The choice
//   between that and one thread block a matrix is made by the number of rounds. Cycles a step in A's sum, and in the
//   elimination, of which 50 are for barrier and latency, the rest instructions:
//     n = 64: 45, 145;   n = 100 in 4 parts: 100, 190;   n = 100 whole: 96, 235, two of which hide each other's
//     latency.
//
// Shared memory: 37 to 73 KB a block.
#pragma once

#include <utility>

#include "cuda/elimination.h"

namespace tpext::cuda {
namespace {

// Up to G groups of 32 rows and C groups of 32 columns of [A B'], on W warps.
template <class T, int G, int C, int W>
struct Large {
  static constexpr int kThreads = W * kWarp;
  static constexpr int kRows = kWarp / W;  // of a group, in a thread
  static constexpr int kSlots = G * kRows;
  static constexpr int kOrder = G * kWarp;
  static constexpr int kStride = kOrder + kVector<T>;                 // of rows of B in shared memory
  static constexpr int kDepth = sizeof(T) == 8 && G == 4 ? 64 : 128;  // rows of B there at a time
  static constexpr int kSlices = static_cast<int>(kLargestInverse) / kDepth;
  static constexpr int kNumbers = kDepth * kStride + 2 * C * kWarp + 4 * kOrder;
  static constexpr int kSharedBytes = kNumbers * static_cast<int>(sizeof(T));

  // Row of a thread's slot kRows h + r.
  TPEXT_HOST_DEVICE static constexpr int row(int h, int warp, int r) { return h * kWarp + kRows * warp + r; }
  // Whether the row group h still needs the column group b once pivots are in group g: not what is eliminated, nor what
  // lies below the diagonal, whose mirror image is there.
  TPEXT_HOST_DEVICE static constexpr bool needed(int g, int h, int b) { return b >= g && b >= h; }
  // Whether X has elements in row group h and column group b: its columns follow A's, of which there are as many as
  // rows, and more than 64 where G = 4.
  TPEXT_HOST_DEVICE static constexpr bool in_solution(int h, int b) { return b >= h && b >= G - 2; }
  // Whether slot (h, r) of column group b holds a part of what the step of slot (g, e) has to publish.
  TPEXT_HOST_DEVICE static constexpr bool urgent(int g, int e, int h, int r, int b) {
    const bool in_row = h == g && r == (e + 1) % kRows, in_column = b == g && h <= g;
    const bool in_next_group = e == kRows - 1 && g + 1 < G && ((h == g + 1 && r == 0) || (b == g + 1 && h <= g + 1));
    return needed(g, h, b) && (in_row || in_column || in_next_group);
  }
};

// What a block keeps in shared memory, and where in it the thread stands.
template <class T, int G, int C, int W>
struct Team {
  using Layout = Large<T, G, C, W>;
  static constexpr int kRows = Layout::kRows, kSlots = Layout::kSlots;
  int warp, lane;
  T* staged;       // [depth, 32 G] of B
  T* rows;         // [2, 32 C]: the pivot row
  T* columns;      // [2, 32 G]: the pivot column above and in the pivot's group, 0 in the pivot's place
  T* pivots;       // [32 G]
  T* reciprocals;  // [32 G]

  __device__ explicit Team(T* shared)
      : warp(thread_index() / kWarp),
        lane(thread_index() % kWarp),
        staged(shared),
        rows(staged + Layout::kDepth * Layout::kStride),
        columns(rows + 2 * C * kWarp),
        pivots(columns + 2 * Layout::kOrder),
        reciprocals(pivots + Layout::kOrder) {}

  // Rows [begin, begin + depth) of B, with zeros in the columns from k on. The weight's rows are rows of B (`tall`) or
  // columns. Loads go ahead of the stores, many at a time: their latency is most of the cost.
  template <bool tall>
  __device__ void stage(const T* weight, const Sizes& sizes, int begin, int depth) const {
    constexpr int kLines = sizeof(T) == 8 ? 4 : 8, kPieces = (tall ? Layout::kOrder : Layout::kDepth) / kWarp;
    static_assert((tall ? Layout::kDepth : Layout::kOrder) % (W * kLines) == 0, "stores stay within the staged rows");
    const int lines = tall ? depth : sizes.order, length = tall ? sizes.order : depth;
    const T* const from = weight + (tall ? begin * sizes.order : begin);
    const int stride = tall ? sizes.order : sizes.terms;
#pragma unroll 1
    for (int line = warp; line < (tall ? depth : Layout::kOrder); line += W * kLines) {
      T value[kLines][kPieces];
#pragma unroll
      for (int u = 0; u < kLines; ++u)
#pragma unroll
        for (int b = 0; b < kPieces; ++b) {
          const int across = line + u * W, along = b * kWarp + lane;
          value[u][b] = across < lines && along < length ? from[across * stride + along] : T(0);
        }
#pragma unroll
      for (int u = 0; u < kLines; ++u)
#pragma unroll
        for (int b = 0; b < kPieces; ++b) {
          const int across = line + u * W, along = b * kWarp + lane;
          staged[tall ? across * Layout::kStride + along : along * Layout::kStride + across] = value[u][b];
        }
    }
  }

  // a += the staged rows' part of B'B.
  __device__ void add_gram(int depth, T (&a)[kSlots][C]) const {
#pragma unroll 2
    for (int t = 0; t < depth; ++t) {
      const T* const row = staged + t * Layout::kStride;
      T column[G];
#pragma unroll
      for (int b = 0; b < G; ++b) column[b] = row[b * kWarp + lane];
#pragma unroll
      for (int h = 0; h < G; ++h) {
        T factor[kRows];
        load_packs<kRows>(row + Layout::row(h, warp, 0), factor);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int b = h; b < G; ++b) a[kRows * h + r][b] += factor[r] * column[b];
      }
    }
  }

  // [A B'] of the weight, of B' the columns [first, end) alone.
  __device__ __forceinline__ void prepare(const T* weight, const Sizes& sizes, T reg, int first, int end,
                                          T (&a)[kSlots][C]) const {
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
#pragma unroll
      for (int b = 0; b < C; ++b) a[i][b] = T(0);
#pragma unroll 1
    for (int slice = 0; slice < Layout::kSlices; ++slice) {
      const int begin = slice * Layout::kDepth, left = sizes.terms - begin;
      const int depth = left < Layout::kDepth ? left : Layout::kDepth;
      if (slice > 0) block_barrier();
      if (sizes.tall)
        stage<true>(weight, sizes, begin, depth);
      else
        stage<false>(weight, sizes, begin, depth);
      block_barrier();
#pragma unroll
      for (int b = 0; b < C; ++b) {
        const int column = b * kWarp + lane, t = first + column - sizes.order;
        if (column >= sizes.order && t < end && t >= begin && t < begin + depth)
#pragma unroll
          for (int h = 0; h < G; ++h)
            if (Layout::in_solution(h, b)) {
              T piece[kRows];
              load_packs<kRows>(staged + (t - begin) * Layout::kStride + Layout::row(h, warp, 0), piece);
#pragma unroll
              for (int r = 0; r < kRows; ++r) a[kRows * h + r][b] = piece[r];
            }
      }
      add_gram(depth, a);
    }
#pragma unroll
    for (int h = 0; h < G; ++h)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (lane == kRows * warp + r && Layout::row(h, warp, r) < sizes.order) a[kRows * h + r][h] += reg;
  }

  // Row and column j, which stands in slot (g, e) of warp w, for step j.
  template <int g, int e>
  __device__ __forceinline__ void publish(int w, const T (&a)[kSlots][C]) const {
    T* const row = rows + e % 2 * C * kWarp;
    T* const column = columns + e % 2 * Layout::kOrder;
    if (lane == kRows * w + e) {
      if (warp == w) {
        const int j = Layout::row(g, w, e);
        pivots[j] = a[kRows * g + e][g];
        reciprocals[j] = T(1) / a[kRows * g + e][g];
      }
#pragma unroll
      for (int h = 0; h <= g; ++h) {
        T part[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) part[r] = h == g && r == e && warp == w ? T(0) : a[kRows * h + r][g];
        store_packs<kRows>(part, column + Layout::row(h, warp, 0));
      }
    }
    if (warp == w) {
#pragma unroll
      for (int b = g; b < C; ++b) row[b * kWarp + lane] = a[kRows * g + e][b];
    }
  }

  // Step j < k, of slot (g, e) of warp w.
  template <int g, int e>
  __device__ __forceinline__ void step(int w, int order, T (&a)[kSlots][C]) const {
    const int j = Layout::row(g, w, e);
    const T* const row = rows + e % 2 * C * kWarp;
    const T* const column = columns + e % 2 * Layout::kOrder;
    const T reciprocal = reciprocals[j];
    T pivot[C], factor[kSlots];
#pragma unroll
    for (int b = g; b < C; ++b) pivot[b] = row[b * kWarp + lane] * reciprocal;
    // Below the pivot's group the column is the row: A is symmetric there. (Rows from k on get numbers that nobody
    // reads.)
#pragma unroll
    for (int h = 0; h < G; ++h) {
      T part[kRows];
      load_packs<kRows>((h <= g ? column : row) + Layout::row(h, warp, 0), part);
#pragma unroll
      for (int r = 0; r < kRows; ++r) factor[kRows * h + r] = part[r];
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
#pragma unroll
      for (int b = g; b < C; ++b)
        if (Layout::urgent(g, e, i / kRows, i % kRows, b)) a[i][b] -= factor[i] * pivot[b];
    if (j + 1 < order) {
      if constexpr (e + 1 < kRows)
        publish<g, e + 1>(w, a);
      else if (w + 1 < W)
        publish<g, 0>(w + 1, a);
      else if constexpr (g + 1 < G)
        publish<g + 1, 0>(0, a);
    }
    // Most warps have no row of the last group where k is not a multiple of 32.
    const bool last_group = Layout::row(G - 1, warp, 0) < order;
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (i < kRows * (G - 1) || last_group)
#pragma unroll
        for (int b = g; b < C; ++b)
          if (Layout::needed(g, i / kRows, b) && !Layout::urgent(g, e, i / kRows, i % kRows, b))
            a[i][b] -= factor[i] * pivot[b];
    block_barrier();
  }

  template <int g, int... e>
  __device__ __forceinline__ void steps(int w, int order, T (&a)[kSlots][C], std::integer_sequence<int, e...>) const {
    ((Layout::row(g, w, e) < order ? step<g, e>(w, order, a) : void()), ...);
  }

  // All steps from 32 g on.
  template <int g>
  __device__ __forceinline__ void eliminate(int order, T (&a)[kSlots][C]) const {
#pragma unroll 1
    for (int w = 0; w < W; ++w) steps<g>(w, order, a, std::make_integer_sequence<int, kRows>());
    if constexpr (g + 1 < G) eliminate<g + 1>(order, a);
  }

  // Whether the elimination came to its end. All threads of all parts come to the same answer.
  __device__ bool regular(int order) const {
    bool all = true;
    for (int i = lane; i < order; i += kWarp) all = all && usable(pivots[i]);
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) all = shuffle_xor(static_cast<int>(all), mask) != 0 && all;
    return all;
  }

  // The columns [first, end) of X, or NaN.
  __device__ __forceinline__ void write(const T (&a)[kSlots][C], const Sizes& sizes, int first, int end, bool regular,
                                        T* inverse) const {
#pragma unroll
    for (int h = 0; h < G; ++h)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = Layout::row(h, warp, r);
        if (i >= sizes.order) continue;
        const T reciprocal = reciprocals[i];
#pragma unroll
        for (int b = 0; b < C; ++b) {
          const int column = b * kWarp + lane, t = first + column - sizes.order;
          if (Layout::in_solution(h, b) && column >= sizes.order && t < end)
            inverse[sizes.in_inverse(i, t)] = regular ? a[kRows * h + r][b] * reciprocal : kNaN<T>;
        }
      }
  }

  // By one warp; asked of failures only.
  __device__ bool finite(const T* weight, int64_t size) const {
    T check = T(0);
    for (int64_t i = lane; i < size; i += kWarp) check += weight[i] * T(0);
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) check += shuffle_xor(check, mask);
    return check == T(0);
  }
};

// Each matrix in `parts` blocks, which invert for `width` columns of B' each.
template <class T, int G, int C, int W>
__global__ void __launch_bounds__(W* kWarp)
    invert_large(const __grid_constant__ RegularizedInverse<T> args, T reg, int parts, int width) {
  using Layout = Large<T, G, C, W>;
  using Result = RegularizedInverse<T>;
  const Team<T, G, C, W> team(reinterpret_cast<T*>(shared_memory()));
  const Sizes sizes(args.rows, args.columns);
  const int64_t matrix = block_index() / parts;
  const int part = block_index() % parts, first = part * width;
  const int end = first + width < sizes.terms ? first + width : sizes.terms;
  const T* const weight = args.weight + matrix * sizes.size();

  T a[Layout::kSlots][C];
  team.prepare(weight, sizes, reg, first, end, a);
  team.template publish<0, 0>(0, a);
  block_barrier();
  team.template eliminate<0>(sizes.order, a);

  const bool regular = team.regular(sizes.order);
  team.write(a, sizes, first, end, regular, args.inverse + matrix * sizes.size());
  if (part == 0 && team.warp == 0) {
    const int64_t status = regular                             ? Result::ok
                           : team.finite(weight, sizes.size()) ? Result::singular
                                                               : Result::not_finite;
    if (team.lane == 0) args.status[matrix] = status;
  }
}

}  // namespace
}  // namespace tpext::cuda
