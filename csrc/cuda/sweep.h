// One sweep over time, the skeleton of every recurrent kernel: a step multiplies the states of a few batch rows with
// weights that stay on the chip and turns the sums into the next states.
//
//     y_p[row] = state_p[row] M_p   (p = 0 .. Step::kProducts - 1),      state'[row] = step(y[row], what it reads at t)
//
// A Step (rnn_scan.cu, rnn_target_scan.cu) holds the arrays and the elementwise work. How the work is split:
//
//   block    H <= 128: a block has all columns, its rows' states lie in its shared memory, one block barrier a step.
//   cluster  the columns are spread over the blocks of a thread-block cluster; each thread stores what it computed in
//            the shared memory of all of them, one cluster barrier a step. sm_90.
//   grid     the same over blocks of a cooperative grid: states go through global memory, a counter is the barrier.
//
// The rows of a member of the stack are dealt to groups (a block, or the blocks that share columns), in tiles of as
// many rows as a product takes; a group does all its tiles at a step, then one barrier. Two copies of the states in
// turns: what a step writes is read at the next, and nobody still reads what it overwrites.
//
// Memory of a block: the weights in registers (at most 128 a thread), 2 P rows stride states in shared memory. Traffic
// a step and row: what the Step says, read `kAhead` items before it is needed. What a step costs predicts
// `cycles_of_step` (plan.h).
//
// Deterministic: a sum's order depends on dtype, H and the kind of regime alone; rows do not touch each other; no float
// atomics.
#pragma once

#include "core/rnn.h"
#include "cuda/product.h"

namespace tpext::cuda {

// Members that one launch takes: their directions travel with the arguments.
constexpr int kMaxMembers = 1024;

struct SweepSizes {
  int time, batch, hidden, members;
  int first_group;            // of the launch
  int groups, tiles, shards;  // groups of rows a member, tiles of rows a group, blocks that share the columns
  bool through_grid;          // how blocks exchange states
  const int64_t* lengths;     // [B] or null
  uint32_t reverse[kMaxMembers / 32];
};

// What a product multiplies by: M(k, n) is element [k][n], or where transposed [n][k].
template <class T>
struct Matrix {
  const T* elements;  // [S, H, H]
  bool transposed;
};

// Valid steps of a row of the batch.
__device__ inline int valid_steps(const SweepSizes& sizes, int row) {
  const int64_t count = sizes.lengths == nullptr ? sizes.time : sizes.lengths[row];
  return static_cast<int>(count < 0 ? 0 : count > sizes.time ? sizes.time : count);
}

// What blocks of the grid regime share: a counter a group, 128 bytes apart, then its states [2][P][rows][stride].
struct Exchange {
  uint32_t* counters;
  void* states;
};
constexpr int64_t kCounterStride = 32;

template <class Step>
struct SweepArgs {
  SweepSizes sizes;
  Exchange exchange;
  Step step;
};

// An element of a step: its offsets in [S, T, B, H] and in [S, B, H]; whether the row takes part in this step, and
// whether the row's sweep begins with it.
struct Position {
  int64_t element, initial;
  bool valid, first;
};

// Bytes of shared memory of a block: states, the rows' steps, scratch of the products.
TPEXT_HOST_DEVICE constexpr int64_t state_bytes(int products, int64_t rows, int stride, int element_bytes) {
  return 2 * products * rows * stride * element_bytes;
}
TPEXT_HOST_DEVICE constexpr int64_t steps_bytes(int64_t rows) { return (rows * 4 + 15) / 16 * 16; }

template <class Product, class Step, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) sweep(const __grid_constant__ SweepArgs<Step> args) {
  using T = typename Product::Storage;
  using C = typename Product::Compute;
  constexpr int kProducts = Step::kProducts, kOutputs = Product::kOutputs, kStride = Product::kStride;
  // Items (a tile at a step) whose reads of global memory are issued together, as many items ahead of their use: a read
  // takes up to 800 cycles, a step of one row some 400, of more rows or blocks longer.
  constexpr int kAhead = kShared ? 1 : Product::kRows == 1 ? 4 : 2;
  static_assert(kProducts == 1 || kProducts == 2);
  const SweepSizes& sizes = args.sizes;
  const Step& step = args.step;
  const int H = sizes.hidden, thread = thread_index();

  const int shard = block_index() % sizes.shards;
  const int group = block_index() / sizes.shards % sizes.groups;  // of this launch
  const int member = block_index() / sizes.shards / sizes.groups;
  const bool reverse = (sizes.reverse[member / 32] >> (member % 32) & 1) != 0;
  const int tiles = kShared ? sizes.tiles : 1;
  const int rows = tiles * Product::kRows;  // of a group, some beyond the batch
  const int row_begin = (sizes.first_group + group) * rows, column_begin = shard * Product::kColumns;

  T* const states = reinterpret_cast<T*>(shared_memory());
  int* const steps = reinterpret_cast<int*>(states + 2 * kProducts * rows * kStride);
  char* const scratch = reinterpret_cast<char*>(steps) + steps_bytes(rows);
  const auto state_at = [&](int turn, int p) { return states + (turn * kProducts + p) * rows * kStride; };
  T* const exchanged = static_cast<T*>(args.exchange.states) +
                       static_cast<int64_t>(member * sizes.groups + group) * 2 * kProducts * rows * kStride;
  uint32_t* const counter =
      args.exchange.counters + static_cast<int64_t>(member * sizes.groups + group) * kCounterStride;

  // The weights, once. Beyond H both are zero, so that padding adds nothing.
  Product products[kProducts];
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
    const Matrix<T> matrix = step.matrix(p);
    const T* const weights = matrix.elements + static_cast<int64_t>(member) * H * H;
    products[p].load([&](int k, int column) {
      const int n = column_begin + column;
      return k < H && n < H ? weights[matrix.transposed ? n * H + k : k * H + n] : T{};
    });
  }

  // The first states, and the padding of both copies.
  for (int i = thread; i < 2 * kProducts * rows * kStride; i += kThreads) {
    const int k = i % kStride, row = row_begin + i / kStride % rows, turn_product = i / kStride / rows;
    states[i] = turn_product < kProducts && k < H && row < sizes.batch
                    ? step.first_state((static_cast<int64_t>(member) * sizes.batch + row) * H + k)
                    : T{};
  }
  for (int r = thread; r < rows; r += kThreads) {
    steps[r] = row_begin + r < sizes.batch ? valid_steps(sizes, row_begin + r) : 0;
  }

  // The elements that this thread computes in every tile, and whether they count: there may be more than H columns.
  int row_of[kOutputs], column_of[kOutputs];
  bool owned[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const Output output = Product::output(thread, i);
    row_of[i] = output.row;
    column_of[i] = column_begin + output.column;
    owned[i] = Product::owns(thread) && column_of[i] < H;
  }
  const int rows_left = sizes.batch - row_begin;
  const auto counts = [&](int tile, int i) { return owned[i] && tile * Product::kRows + row_of[i] < rows_left; };

  // Offsets in [S, T, B, H]: of the group's first row at an item's step, and from there.
  const int64_t plane = static_cast<int64_t>(sizes.batch) * H, group_begin = static_cast<int64_t>(row_begin) * H;
  const bool ascends = reverse == Step::kBackward;
  const int64_t next = ascends ? plane : -plane;
  const auto offset = [&](int tile, int i) { return (tile * Product::kRows + row_of[i]) * H + column_of[i]; };
  const bool ragged = sizes.lengths != nullptr;
  // A row's steps and the sweep's number of its first; where a block has one tile, they stay in registers.
  const auto begin_of = [&](int count) { return ascends ? 0 : sizes.time - count; };
  int count_of[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i)
    count_of[i] = kShared || !ragged || !counts(0, i) ? sizes.time : valid_steps(sizes, row_begin + row_of[i]);
  const auto position = [&](int j, int tile, int64_t base, int i) {
    const int count = kShared && ragged ? steps[tile * Product::kRows + row_of[i]] : count_of[i];
    return Position{base + offset(tile, i), static_cast<int64_t>(member) * plane + group_begin + offset(tile, i),
                    static_cast<unsigned>(j - begin_of(count)) < static_cast<unsigned>(count), j == begin_of(count)};
  };
  // What enters at a row's first step: read on the way where a block has several tiles, else before all.
  typename Step::Start starts[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    starts[i] = {};
    if (!kShared && counts(0, i))
      starts[i] = step.start(static_cast<int64_t>(member) * plane + group_begin + offset(0, i));
  }

  // The item in work, and the next one to be read.
  struct Item {
    int j, tile;
    int64_t base;
  };
  Item item{0, 0, (static_cast<int64_t>(member) * sizes.time + (ascends ? 0 : sizes.time - 1)) * plane + group_begin};
  Item ahead = item;
  const auto advance = [&](Item& at) {
    if (++at.tile == tiles) {
      at.tile = 0;
      at.base += next;
      ++at.j;
    }
  };
  // A wait for one read is a wait for all that were issued before. So the reads for several items are issued together
  // into a second set, for the items after these; one item's are issued as soon as the last ones are used.
  constexpr bool kTogether = kAhead > 1;
  typename Step::Loads loads[kAhead][kOutputs], coming[kTogether ? kAhead : 1][kOutputs];
  const auto load = [&](typename Step::Loads(&into)[kOutputs]) {
    if (ahead.j >= sizes.time) return;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i)
      if (counts(ahead.tile, i)) step.load(into[i], ahead.base + offset(ahead.tile, i), next, ahead.j == 0);
    advance(ahead);
  };
#pragma unroll
  for (int a = 0; a < kAhead; ++a) load(loads[a]);

  const auto multiply = [&](int turn, int tile, C(&y)[kProducts][kOutputs]) {
#pragma unroll
    for (int p = 0; p < kProducts; ++p)
      products[p].product(state_at(turn, p) + tile * Product::kRows * kStride, scratch + p * Product::kScratchBytes,
                          y[p]);
  };
  const auto pass_on = [&](int turn, int p, int row, int column, T value) {
    T* const own = state_at(turn, p) + row * kStride + column;
    if constexpr (!kShared) {
      *own = value;
    } else if (sizes.through_grid) {
      exchanged[((turn * kProducts + p) * rows + row) * static_cast<int64_t>(kStride) + column] = value;
    } else {
      for (int s = 0; s < sizes.shards; ++s) *in_cluster(own, s) = value;
    }
  };

  // No block may write to another's shared memory before that one is done with its padding.
  if (kShared && !sizes.through_grid) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_barrier();
  }

  while (item.j < sizes.time) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if constexpr (kTogether) load(coming[a]);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (item.j >= sizes.time) break;
      const int turn = item.j & 1;
      const bool ends_step = item.tile + 1 == tiles;
      C y[kProducts][kOutputs];
      multiply(turn, item.tile, y);
      typename Step::Result results[kOutputs];
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        if (!counts(item.tile, i)) continue;
        const int row = item.tile * Product::kRows + row_of[i];
        const Position at = position(item.j, item.tile, item.base, i);
        C sums[kProducts];
#pragma unroll
        for (int p = 0; p < kProducts; ++p) sums[p] = y[p][i];
        typename Step::Start start = starts[i];
        if (kShared) start = at.first ? step.start(at.initial) : typename Step::Start{};
        results[i] = step.advance(loads[a][i], start, at, sums);
#pragma unroll
        for (int p = 0; p < kProducts; ++p) {
          // A row keeps its state before its first step and after its last.
          const T kept =
              at.valid ? from_compute<T>(results[i].carried[p]) : state_at(turn, p)[row * kStride + column_of[i]];
          pass_on(turn ^ 1, p, row, column_of[i], kept);
        }
      }
      // What other threads wait for goes before the barrier, what only memory gets after: an arrival among blocks waits
      // for the writes before it.
      if constexpr (!kShared) {
        block_barrier();
      } else if (ends_step) {
        if (sizes.through_grid) {
          block_barrier();
          if (thread == 0) add_release(counter, 1);
        } else {
          cluster_arrive();
        }
      }
#pragma unroll
      for (int i = 0; i < kOutputs; ++i)
        if (counts(item.tile, i)) step.store(results[i], position(item.j, item.tile, item.base, i));
      if constexpr (!kTogether) load(loads[a]);
      if (kShared && ends_step && !sizes.through_grid) cluster_wait();
      if (kShared && ends_step && sizes.through_grid) {
        if (thread == 0)
          while (load_acquire(counter) < static_cast<uint32_t>(sizes.shards) * static_cast<uint32_t>(item.j + 1))
            spin();
        block_barrier();
        static_assert(kStride * sizeof(T) % sizeof(Words) == 0);
        const int64_t begin = static_cast<int64_t>(turn ^ 1) * kProducts * rows * kStride;
        const auto* const from = reinterpret_cast<const Words*>(exchanged + begin);
        auto* const to = reinterpret_cast<Words*>(state_at(turn ^ 1, 0));
        const int words = kProducts * rows * kStride * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(Words));
        for (int i = thread; i < words; i += kThreads) to[i] = load_shared_by_grid(from + i);
        block_barrier();
      }
      advance(item);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int i = 0; i < kOutputs; ++i)
        if constexpr (kTogether) loads[a][i] = coming[a][i];
  }

  // What comes out at the other end. The step that the sweep ended with was the row's first.
  const int turn = sizes.time & 1;
  for (int tile = 0; tile < tiles; ++tile) {
    C y[kProducts][kOutputs] = {};
    if constexpr (Step::kBackward) multiply(turn, tile, y);
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      if (!counts(tile, i)) continue;
      const int row = tile * Product::kRows + row_of[i];
      const int64_t first_step = static_cast<int64_t>(member) * sizes.time + (reverse ? steps[row] - 1 : 0);
      C sums[kProducts];
#pragma unroll
      for (int p = 0; p < kProducts; ++p) sums[p] = y[p][i];
      step.finish({first_step * plane + group_begin + offset(tile, i),
                   static_cast<int64_t>(member) * plane + group_begin + offset(tile, i), steps[row] > 0, false},
                  sums, state_at(turn, 0)[row * kStride + column_of[i]]);
    }
  }
}

// The elementwise work of one step, number `at_step`, for weights that stay nowhere. A thread an element.
template <class Step>
struct SingleStepArgs {
  SweepSizes sizes;
  int at_step;
  const typename Step::Storage* sums;  // [P, S, B, H]
  typename Step::Storage* carried;     // [P, S, B, H]
  int64_t stride;                      // S B H
  Step step;
};

template <class Step>
__global__ void __launch_bounds__(kThreads) single_step(const __grid_constant__ SingleStepArgs<Step> args) {
  using T = typename Step::Storage;
  using C = Compute<T>;
  constexpr int kProducts = Step::kProducts;
  const SweepSizes& sizes = args.sizes;
  const int64_t plane = static_cast<int64_t>(sizes.batch) * sizes.hidden;
  const int64_t element = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (element >= sizes.members * plane) return;
  const int member = static_cast<int>(element / plane), row = static_cast<int>(element % plane / sizes.hidden);
  const bool reverse = (sizes.reverse[member / 32] >> (member % 32) & 1) != 0;
  const int count = valid_steps(sizes, row);
  C sums[kProducts];
#pragma unroll
  for (int p = 0; p < kProducts; ++p) sums[p] = to_compute(args.sums[p * args.stride + element]);
  const int64_t base = static_cast<int64_t>(member) * sizes.time, in_plane = element % plane;
  if (args.at_step == sizes.time) {
    const int64_t first_step = base + (reverse ? count - 1 : 0);
    args.step.finish({first_step * plane + in_plane, element, count > 0, false}, sums, args.carried[element]);
    return;
  }
  const bool ascends = reverse == Step::kBackward;
  const int t = ascends ? args.at_step : sizes.time - 1 - args.at_step;
  const int begin = ascends ? 0 : sizes.time - count;
  const Position at{(base + t) * plane + in_plane, element, args.at_step >= begin && args.at_step - begin < count,
                    args.at_step == begin};
  typename Step::Loads loads;
  args.step.load(loads, at.element, ascends ? plane : -plane, args.at_step == 0);
  const typename Step::Start start = at.first ? args.step.start(element) : typename Step::Start{};
  const typename Step::Result result = args.step.advance(loads, start, at, sums);
  args.step.store(result, at);
  if (!at.valid) return;
#pragma unroll
  for (int p = 0; p < kProducts; ++p) args.carried[p * args.stride + element] = from_compute<T>(result.carried[p]);
}

}  // namespace tpext::cuda
