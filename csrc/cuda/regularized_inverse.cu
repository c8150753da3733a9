// regularized_inverse:  R = (W'W + reg I)^-1 W'      if N <= M
//                       R = W' (WW' + reg I)^-1      else
//
// With B = W (or W'), of m = max(M, N) rows and k = min(M, N) columns, both are one system A X = B' with A = B'B + reg
// I for X [k, m], which is R (or R'). It is solved by Gauss-Jordan elimination of [A B'], which needs no pivoting since
// A is positive definite; its pivots are the squares of the Cholesky factor's diagonal. Step j:
//     row_i -= a_ij (row_j / a_jj)   for all i != j
// These are k dependent steps, where a factorisation with two substitutions has 3 k, and k^2 m + k^3 / 3 multiply-adds,
// where that has k^2 m + k^3 / 6; both after k^2 m / 2 for A. For few matrices the steps are what costs. X is carried
// along rather than multiplied by an explicit A^-1, which would lose the square root of A's condition.
//
// m <= 32: a group of N = 8, 16 or 32 lanes a matrix, 128 threads a block. Lane c holds column c of A and of X in
//   registers. A step hands column j from its lane to the others through shared memory (two buffers, one warp barrier).
//   Registers shift by one a step, so that the pivot row always stands first and the loop need not be unrolled. A step
//   takes 70 + 3 N cycles (N stores and loads by fours, 2 N multiply-adds; 40 for the reciprocal).
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
// Predicted on an H200 (132 multiprocessors, 1.8 GHz), float32, in microseconds, of which launch and first loads
// are 2.5:
//     n            8    16    32    64   100
//     batch 1      3     4   6.5    10    19
//     batch 64     3     4   6.5    10    23
//     batch 4096   4     7    28   150   510
// From 16 on, that is arithmetic and its instructions; traffic is 2 M N numbers a matrix, 70 us for the last entry.
//
// Shared memory: (N + 6) (N + 4) numbers a small matrix; else 37 to 73 KB a block. Deterministic: which
// block, part or width of block computes an element changes none of its operations, and nothing is summed across
// threads.
#include <limits>
#include <utility>

#include "cuda/kernels.h"

namespace tpext::cuda {
namespace {

template <class T>
constexpr int kVector = 16 / sizeof(T);
template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// One access of 16 bytes.
template <class T>
struct alignas(16) Pack {
  T value[kVector<T>];
};

template <int Count, class T>
__device__ inline void load_packs(const T* from, T (&to)[Count]) {
  static_assert(Count % kVector<T> == 0);
#pragma unroll
  for (int i = 0; i < Count; i += kVector<T>) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) to[i + v] = pack.value[v];
  }
}

template <int Count, class T>
__device__ inline void store_packs(const T (&from)[Count], T* to) {
  static_assert(Count % kVector<T> == 0);
#pragma unroll
  for (int i = 0; i < Count; i += kVector<T>) {
    Pack<T> pack;
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) pack.value[v] = from[i + v];
    *reinterpret_cast<Pack<T>*>(to + i) = pack;
  }
}

// B [m, k] and R of one matrix.
struct Sizes {
  bool tall;    // N <= M: B = W
  int order;    // k
  int terms;    // m
  int of_term;  // distance in R of columns of X
  int of_row;   // distance in R of rows of X

  TPEXT_HOST_DEVICE Sizes(int64_t rows, int64_t columns)
      : tall(columns <= rows),
        order(static_cast<int>(tall ? columns : rows)),
        terms(static_cast<int>(tall ? rows : columns)),
        of_term(tall ? 1 : order),
        of_row(tall ? terms : 1) {}

  TPEXT_HOST_DEVICE int64_t size() const { return static_cast<int64_t>(order) * terms; }
  // Where element (i, t) of X lies in the inverse.
  TPEXT_HOST_DEVICE int in_inverse(int i, int t) const { return i * of_row + t * of_term; }
};

// Whether an elimination can go on: comparisons fail for NaN. A singular matrix without regularisation may pass, with a
// tiny pivot that rounding left: the caller asks of its inverse whether it lost a dimension.
template <class T>
__device__ bool usable(T pivot) {
  return pivot > T(0) && pivot <= kLargest<T>;
}

// ---- a group of lanes a matrix ----

constexpr int kSmallThreads = 128;

template <class T, int N>
struct Small {
  static constexpr int kMatrices = kSmallThreads / N;  // of a block
  static constexpr int kStride = N + kVector<T>;       // of B's rows: the lanes' reads of their own rows do not collide
  static constexpr int kNumbers = N * kStride + 2 * N;
  static constexpr int kSharedBytes = kMatrices * kNumbers * static_cast<int>(sizeof(T));

  // After `steps` shifts slot i holds this row.
  TPEXT_HOST_DEVICE static int row(int i, int steps) { return i + steps < N ? i + steps : i + steps - N; }
};

template <class T, int N>
__global__ void __launch_bounds__(kSmallThreads) invert_small(const __grid_constant__ RegularizedInverse<T> args) {
  using Layout = Small<T, N>;
  const Sizes sizes(args.rows, args.columns);
  const int lane = thread_index() % N, group = thread_index() / N;
  const int64_t matrix = static_cast<int64_t>(block_index()) * Layout::kMatrices + group;
  if (matrix - group % (kWarp / N) >= args.batch) return;
  // A group without a matrix computes with zeros: collectives need the whole warp.
  const bool present = matrix < args.batch;
  const T* const weight = args.weight + matrix * sizes.size();
  T* const staged = reinterpret_cast<T*>(shared_memory()) + group * Layout::kNumbers;
  T* const columns = staged + N * Layout::kStride;

  T a[N], x[N], check = T(0);
  const int lines = static_cast<int>(args.rows), length = static_cast<int>(args.columns);
  const int of_line = sizes.tall ? Layout::kStride : 1, of_lane = sizes.tall ? 1 : Layout::kStride;
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = present && i < lines && lane < length ? weight[i * length + lane] : T(0);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    check += a[i] * T(0);
    staged[i * of_line + lane * of_lane] = a[i];
  }
  warp_barrier();

  load_packs<N>(staged + lane * Layout::kStride, x);
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = T(0);
#pragma unroll 2
  for (int t = 0; t < sizes.terms; ++t) {
    const T own = staged[t * Layout::kStride + lane];
    T row[N];
    load_packs<N>(staged + t * Layout::kStride, row);
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] += row[i] * own;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i == lane) a[i] += args.reg;

  bool regular = true;
#pragma unroll 1
  for (int j = 0; j < sizes.order; ++j) {
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

#pragma unroll
  for (int mask = N / 2; mask > 0; mask /= 2) check += shuffle_xor(check, mask);
  if (!present) return;
  T* const inverse = args.inverse + matrix * sizes.size();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int row = Layout::row(i, sizes.order);
    if (row < sizes.order && lane < sizes.terms) inverse[sizes.in_inverse(row, lane)] = regular ? x[i] : kNaN<T>;
  }
  using Result = RegularizedInverse<T>;
  if (lane == 0) args.status[matrix] = regular ? Result::ok : check == T(0) ? Result::singular : Result::not_finite;
}

// ---- a block a matrix, or a part of one ----

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
    invert_large(const __grid_constant__ RegularizedInverse<T> args, int parts, int width) {
  using Layout = Large<T, G, C, W>;
  constexpr int kRows = Layout::kRows, kSlots = Layout::kSlots;
  using Result = RegularizedInverse<T>;
  const Team<T, G, C, W> team(reinterpret_cast<T*>(shared_memory()));
  const Sizes sizes(args.rows, args.columns);
  const int64_t matrix = block_index() / parts;
  const int part = block_index() % parts, first = part * width;
  const int end = first + width < sizes.terms ? first + width : sizes.terms;
  const T* const weight = args.weight + matrix * sizes.size();

  T a[kSlots][C];
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
      team.template stage<true>(weight, sizes, begin, depth);
    else
      team.template stage<false>(weight, sizes, begin, depth);
    block_barrier();
#pragma unroll
    for (int b = 0; b < C; ++b) {
      const int column = b * kWarp + team.lane, t = first + column - sizes.order;
      if (column >= sizes.order && t < end && t >= begin && t < begin + depth)
#pragma unroll
        for (int h = 0; h < G; ++h)
          if (Layout::in_solution(h, b)) {
            T piece[kRows];
            load_packs<kRows>(team.staged + (t - begin) * Layout::kStride + Layout::row(h, team.warp, 0), piece);
#pragma unroll
            for (int r = 0; r < kRows; ++r) a[kRows * h + r][b] = piece[r];
          }
    }
    team.add_gram(depth, a);
  }
#pragma unroll
  for (int h = 0; h < G; ++h)
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (team.lane == kRows * team.warp + r && Layout::row(h, team.warp, r) < sizes.order)
        a[kRows * h + r][h] += args.reg;

  team.template publish<0, 0>(0, a);
  block_barrier();
  team.template eliminate<0>(sizes.order, a);

  const bool regular = team.regular(sizes.order);
  T* const inverse = args.inverse + matrix * sizes.size();
#pragma unroll
  for (int h = 0; h < G; ++h)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = Layout::row(h, team.warp, r);
      if (i < sizes.order) {
        const T reciprocal = team.reciprocals[i];
#pragma unroll
        for (int b = 0; b < C; ++b) {
          const int column = b * kWarp + team.lane, t = first + column - sizes.order;
          if (Layout::in_solution(h, b) && column >= sizes.order && t < end)
            inverse[sizes.in_inverse(i, t)] = regular ? a[kRows * h + r][b] * reciprocal : kNaN<T>;
        }
      }
    }
  if (part == 0 && team.warp == 0) {
    const int64_t status = regular                             ? Result::ok
                           : team.finite(weight, sizes.size()) ? Result::singular
                                                               : Result::not_finite;
    if (team.lane == 0) args.status[matrix] = status;
  }
}

template <class T, int N>
void launch_small(const RegularizedInverse<T>& args, const Queue& queue) {
  using Layout = Small<T, N>;
  const int64_t blocks = (args.batch + Layout::kMatrices - 1) / Layout::kMatrices;
  launch(invert_small<T, N>, Shape{blocks, kSmallThreads, Layout::kSharedBytes}, queue, args);
}

// Blocks a matrix where a block has C groups of columns, the k columns of A among them.
TPEXT_HOST_DEVICE constexpr int parts_of(int groups, const Sizes& sizes) {
  const int width = groups * kWarp - sizes.order;
  return (sizes.terms + width - 1) / width;
}

template <class T, int G, int C, int W>
void launch_large(const RegularizedInverse<T>& args, const Sizes& sizes, const Queue& queue) {
  using Layout = Large<T, G, C, W>;
  const int parts = parts_of(C, sizes), width = (sizes.terms + parts - 1) / parts;
  const Shape shape{args.batch * parts, Layout::kThreads, Layout::kSharedBytes};
  launch(invert_large<T, G, C, W>, shape, queue, args, parts, width);
}

}  // namespace

template <class T>
void regularized_inverse(const RegularizedInverse<T>& args, const Queue& queue) {
  const Sizes sizes(args.rows, args.columns);
  if (sizes.terms <= 8) return launch_small<T, 8>(args, queue);
  if (sizes.terms <= 16) return launch_small<T, 16>(args, queue);
  if (sizes.terms <= 32) return launch_small<T, 32>(args, queue);
  if (sizes.order <= 64) return launch_large<T, 2, 4, 4>(args, sizes, queue);
  // Narrow blocks eliminate A again for each part, wide ones leave multiprocessors idle where matrices are few: the
  // least number of rounds times what a round takes, by the head's count.
  const int64_t multiprocessors = limits(queue.device).multiprocessors;
  const auto cost = [&](int groups) {
    return (args.batch * parts_of(groups, sizes) + multiprocessors - 1) / multiprocessors * (17 + 3 * groups);
  };
  int best = 5;
  for (const int groups : {4, 7, 8}) {
    const bool there = groups == 4 ? sizes.order <= 112 : sizeof(T) == 4;
    if (there && cost(groups) < cost(best)) best = groups;
  }
  if (best == 4) return launch_large<T, 4, 4, 8>(args, sizes, queue);
  if constexpr (sizeof(T) == 4) {
    if (best == 7) return launch_large<T, 4, 7, 4>(args, sizes, queue);
    if (best == 8) return launch_large<T, 4, 8, 8>(args, sizes, queue);
  }
  launch_large<T, 4, 5, 8>(args, sizes, queue);
}

template void regularized_inverse<float>(const RegularizedInverse<float>&, const Queue&);
template void regularized_inverse<double>(const RegularizedInverse<double>&, const Queue&);

}  // namespace tpext::cuda
