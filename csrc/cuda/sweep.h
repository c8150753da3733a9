// One sweep over time, the skeleton of every recurrent kernel: a step multiplies the states of a few batch rows with
// weights that stay on the chip and turns the sums into the next states.
//
//     y_p[row] = state_p[row] M_p   (p = 0 .. Step::kProducts - 1),      state'[row] = step(y[row], what it reads at t)
//
// A Step (rnn_scan.cu, backward_sweep.h) holds the arrays and the elementwise work. How the work is split:
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
// a step and row: what the Step says, read `kAhead` items before it is needed. A step costs
//     latency + tiles rows P depth columns / (multiply-adds a cycle) cycles,
// with the constants of `cycles_of_step`; they are predictions until measured, and choose between variants.
//
// Deterministic: a sum's order depends on the variant alone; rows do not touch each other; no float atomics. A launch
// reads every index of shared and global memory from the functions and constants of product.h and the ones marked
// TPEXT_HOST_DEVICE here.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/product.h"

namespace tpext::cuda {

// Members that one launch takes: their directions travel with the arguments.
constexpr int kMaxMembers = 1024;

struct SweepSizes {
  int time, batch, hidden, members;
  int groups, tiles, shards;  // groups of rows a member, tiles of rows a group, blocks that share the columns
  bool through_grid;          // how blocks exchange states
  const int64_t* lengths;     // [B] or null
  uint32_t reverse[kMaxMembers / 32];
};

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
  // Items (a tile at a step) between a read of global memory and its use. A step of one row takes some 300 cycles, a
  // read up to 800; tiles of more rows and steps of several blocks take longer.
  constexpr int kAhead = Product::kDepth > 512 ? 1 : Product::kRows == 1 && !kShared ? 4 : 2;
  static_assert(kProducts == 1 || kProducts == 2);
  const SweepSizes& sizes = args.sizes;
  const Step& step = args.step;
  const int H = sizes.hidden, thread = thread_index();

  const int shard = block_index() % sizes.shards;
  const int group = block_index() / sizes.shards % sizes.groups;
  const int member = block_index() / sizes.shards / sizes.groups;
  const bool reverse = (sizes.reverse[member / 32] >> (member % 32) & 1) != 0;
  const int tiles = kShared ? sizes.tiles : 1;
  const int rows = tiles * Product::kRows;  // of a group, some beyond the batch
  const int row_begin = group * rows, column_begin = shard * Product::kColumns;

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
  for (int p = 0; p < kProducts; ++p)
    products[p].load([&](int k, int column) {
      const int n = column_begin + column;
      return k < H && n < H ? step.weight(p, member, H, k, n) : T{};
    });

  // The first states, and the padding of both copies.
  for (int i = thread; i < 2 * kProducts * rows * kStride; i += kThreads) {
    const int k = i % kStride, row = row_begin + i / kStride % rows, turn_product = i / kStride / rows;
    states[i] = turn_product < kProducts && k < H && row < sizes.batch
                    ? step.first_state((static_cast<int64_t>(member) * sizes.batch + row) * H + k)
                    : T{};
  }
  for (int r = thread; r < rows; r += kThreads) {
    const int row = row_begin + r;
    int64_t valid = sizes.time;
    if (row >= sizes.batch) valid = 0;
    if (row < sizes.batch && sizes.lengths != nullptr) valid = sizes.lengths[row];
    steps[r] = static_cast<int>(valid < 0 ? 0 : valid > sizes.time ? sizes.time : valid);
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
  const auto position = [&](int j, int tile, int64_t base, int i) {
    const int t = ascends ? j : sizes.time - 1 - j;
    const int count = ragged ? steps[tile * Product::kRows + row_of[i]] : sizes.time;
    return Position{base + offset(tile, i), static_cast<int64_t>(member) * plane + group_begin + offset(tile, i),
                    !ragged || t < count, ragged && !reverse ? t == count - 1 : j == 0};
  };

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
  typename Step::Loads loads[kAhead][kOutputs];
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
        results[i] = step.advance(loads[a][i], at, sums);
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
      load(loads[a]);
      if (kShared && ends_step && !sizes.through_grid) cluster_wait();
      if (kShared && ends_step && sizes.through_grid) {
        if (thread == 0)
          while (load_acquire(counter) < static_cast<uint32_t>(sizes.shards) * static_cast<uint32_t>(item.j + 1))
            spin();
        block_barrier();
        static_assert(kStride * sizeof(T) % 8 == 0);
        const int64_t begin = static_cast<int64_t>(turn ^ 1) * kProducts * rows * kStride;
        const auto* const from = reinterpret_cast<const unsigned long long*>(exchanged + begin);
        auto* const to = reinterpret_cast<unsigned long long*>(state_at(turn ^ 1, 0));
        const int words = kProducts * rows * kStride * static_cast<int>(sizeof(T)) / 8;
        for (int i = thread; i < words; i += kThreads) to[i] = load_shared_by_grid(from + i);
        block_barrier();
      }
      advance(item);
    }
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
  const int64_t valid = sizes.lengths == nullptr ? sizes.time : sizes.lengths[row];
  const int count = static_cast<int>(valid < 0 ? 0 : valid > sizes.time ? sizes.time : valid);
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
  const Position at{(base + t) * plane + in_plane, element, t < count, t == (reverse ? 0 : count - 1)};
  typename Step::Loads loads;
  args.step.load(loads, at.element, ascends ? plane : -plane, args.at_step == 0);
  const typename Step::Result result = args.step.advance(loads, at, sums);
  args.step.store(result, at);
  if (!at.valid) return;
#pragma unroll
  for (int p = 0; p < kProducts; ++p) args.carried[p * args.stride + element] = from_compute<T>(result.carried[p]);
}

// One way to multiply, as the choice and the launch see it.
template <class Step>
struct Variant {
  void (*kernel)(SweepArgs<Step>);
  bool shared;
  int rows, depth, columns, stride, scratch_bytes;
};

// Cycles of a step of one block: the chain of dependent operations, and the multiply-adds that they hide at best.
template <class T>
double cycles_of_step(bool shared, bool through_grid, int products, int64_t rows, int depth, int columns) {
  // Read the states 45, add up and shuffle 80, activate 60, write and barrier 65; a cluster barrier and remote stores
  // 400 more, release, acquire and read through the second-level cache 3500 more.
  const double latency = 250 + (shared ? (through_grid ? 3500 : 400) : 0);
  const double per_cycle = sizeof(T) == 8 ? 64 : sizeof(T) == 4 ? 128 : 1024;
  return latency + static_cast<double>(products) * static_cast<double>(rows) * depth * columns / per_cycle;
}

// How a call is run.
template <class Step>
struct Choice {
  const Variant<Step>* variant = nullptr;
  Regime regime = Regime::step;
  int groups = 0, tiles = 0, shards = 0;
  int members = 0;  // of a launch
  int64_t workspace_bytes = 0;
  double cycles = 0;  // predicted, of a step
};

inline const char* regime_name(Regime regime) {
  static const char* const names[] = {"auto", "block", "cluster", "grid", "step"};
  return names[static_cast<int>(regime)];
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The cheapest way to run `variant` in `regime` by the prediction; no variant where it cannot.
template <class Step>
Choice<Step> fit(const Variant<Step>& variant, Regime regime, int64_t stack, int64_t batch, int64_t hidden,
                 int device) {
  using T = typename Step::Storage;
  constexpr int kProducts = Step::kProducts;
  const Limits& limit = limits(device);
  Choice<Step> choice;
  const int64_t shards = variant.shared ? ceil_divide(hidden, variant.columns) : 1;
  const bool grid = regime == Regime::grid;
  if (hidden > variant.depth || variant.shared != (regime != Regime::block)) return choice;
  if (!variant.shared && hidden > variant.columns) return choice;
  if (regime == Regime::cluster && (limit.capability < 90 || shards > 16)) return choice;
  if (grid && !limit.cooperative) return choice;

  // As many rows as shared memory holds.
  const auto shared_bytes = [&](int64_t tiles) {
    const int64_t rows = tiles * variant.rows;
    return state_bytes(kProducts, rows, variant.stride, sizeof(T)) + steps_bytes(rows) +
           int64_t{kProducts} * variant.scratch_bytes;
  };
  int64_t most_tiles = 1;
  if (shared_bytes(1) > limit.shared_memory) return choice;
  while (variant.shared && shared_bytes(2 * most_tiles) <= limit.shared_memory) most_tiles *= 2;

  const int64_t tiles_of_batch = ceil_divide(batch, variant.rows);
  // Groups that run side by side, whatever their tiles.
  const int cluster = regime == Regime::cluster ? static_cast<int>(shards) : 1;
  int64_t at_once =
      resident(variant.kernel, {shards, kThreads, static_cast<int>(shared_bytes(most_tiles)), cluster, grid}, device);
  if (grid) at_once /= shards;
  if (!variant.shared) at_once = std::min<int64_t>(at_once, limit.multiprocessors);
  if (at_once < 1) return choice;
  // More tiles a group only where there are more rows than groups at once.
  int64_t members = std::min<int64_t>(stack, kMaxMembers);
  int64_t wanted = std::max<int64_t>(1, at_once / std::max<int64_t>(1, members));
  if (!variant.shared) wanted = tiles_of_batch;
  int64_t tiles = std::clamp<int64_t>(ceil_divide(tiles_of_batch, wanted), 1, most_tiles);
  int64_t groups = ceil_divide(tiles_of_batch, tiles);
  if (grid) {
    // All blocks of a launch run at once: fewer members a launch, or it cannot be.
    if (groups > at_once) return choice;
    members = std::min(members, at_once / std::max<int64_t>(1, groups));
  }
  const int64_t rounds = grid ? ceil_divide(stack, members) : ceil_divide(stack * groups, at_once);
  choice.variant = &variant;
  choice.regime = regime;
  choice.groups = static_cast<int>(groups);
  choice.tiles = static_cast<int>(tiles);
  choice.shards = static_cast<int>(shards);
  choice.members = static_cast<int>(members);
  if (grid)
    choice.workspace_bytes =
        stack * groups * (kCounterStride * 4 + state_bytes(kProducts, tiles * variant.rows, variant.stride, sizeof(T)));
  choice.cycles = static_cast<double>(rounds) * cycles_of_step<T>(variant.shared, grid, kProducts, tiles * variant.rows,
                                                                  variant.depth, variant.columns);
  return choice;
}

// The best variant of the wanted regime, or of the first of block, cluster, grid that can run these sizes.
template <class Step, class Variants>
Choice<Step> choose(const Variants& variants, int64_t stack, int64_t batch, int64_t hidden, int device, Regime wanted) {
  Choice<Step> best;
  if (wanted == Regime::step) return best;
  if (stack == 0 || batch == 0 || hidden == 0) {
    best.regime = Regime::block;
    return best;
  }
  for (const Regime regime : {Regime::block, Regime::cluster, Regime::grid}) {
    if (wanted != Regime::automatic && wanted != regime) continue;
    for (const Variant<Step>& variant : variants) {
      const Choice<Step> choice = fit(variant, regime, stack, batch, hidden, device);
      if (choice.variant != nullptr && (best.variant == nullptr || choice.cycles < best.cycles)) best = choice;
    }
    if (best.variant != nullptr) return best;
  }
  if (wanted != Regime::automatic)
    throw std::invalid_argument(std::string("regime '") + regime_name(wanted) +
                                "' cannot run H=" + std::to_string(hidden) + ", B=" + std::to_string(batch) + " with " +
                                std::to_string(Step::kProducts) + " products a step in this dtype on device " +
                                std::to_string(device));
  return best;
}

template <class Product, class Step, bool kShared>
constexpr Variant<Step> variant_of() {
  return {sweep<Product, Step, kShared>, kShared, Product::kRows, Product::kDepth, Product::kColumns, Product::kStride,
          Product::kScratchBytes};
}

// The variants of a storage type and number of products. Registers bound them: depth x columns x products weights of
// 256 threads, at most 128 registers a thread.
template <class T, int kProducts>
struct VariantsOf;

template <int kProducts>
struct VariantsOf<float, kProducts> {
  template <class Step>
  static constexpr Variant<Step> table[] = {
      // lanes, columns a lane, pieces, tail, rows: depth 32, 64, 104, 128 of as many columns
      variant_of<Multiply<float, 8, 1, 1, 0, 1>, Step, false>(),
      variant_of<Multiply<float, 8, 1, 1, 0, 4>, Step, false>(),
      variant_of<Multiply<float, 8, 2, 2, 0, 1>, Step, false>(),
      variant_of<Multiply<float, 8, 2, 2, 0, 4>, Step, false>(),
      variant_of<Multiply<float, 8, 4, 3, 1, 1>, Step, false>(),
      variant_of<Multiply<float, 8, 4, 3, 1, 4>, Step, false>(),
      variant_of<Multiply<float, 8, 4, 4, 0, 1>, Step, false>(),
      variant_of<Multiply<float, 8, 4, 4, 0, 4>, Step, false>(),
      // depth 256, 512, 1024
      variant_of<Multiply<float, 8, 4 / kProducts, 8, 0, 1>, Step, true>(),
      variant_of<Multiply<float, 8, 4 / kProducts, 8, 0, 4>, Step, true>(),
      variant_of<Multiply<float, 8, 2 / kProducts, 16, 0, 1>, Step, true>(),
      variant_of<Multiply<float, 8, 2 / kProducts, 16, 0, 4>, Step, true>(),
      variant_of<Multiply<float, 8 * kProducts, 1, 32 / kProducts, 0, 4>, Step, true>(),
  };
};

template <>
struct VariantsOf<double, 1> {
  template <class Step>
  static constexpr Variant<Step> table[] = {
      variant_of<Multiply<double, 8, 1, 2, 0, 1>, Step, false>(),
      variant_of<Multiply<double, 8, 2, 4, 0, 1>, Step, false>(),
      variant_of<Multiply<double, 8, 4, 8, 0, 1>, Step, false>(),
      variant_of<Multiply<double, 8, 2, 16, 0, 1>, Step, true>(),
      variant_of<Multiply<double, 8, 1, 32, 0, 1>, Step, true>(),
  };
};

template <>
struct VariantsOf<double, 2> {
  template <class Step>
  static constexpr Variant<Step> table[] = {
      variant_of<Multiply<double, 8, 1, 2, 0, 1>, Step, false>(),
      variant_of<Multiply<double, 8, 2, 4, 0, 1>, Step, false>(),
      variant_of<Multiply<double, 8, 2, 8, 0, 1>, Step, true>(),
      variant_of<Multiply<double, 8, 1, 16, 0, 1>, Step, true>(),
      variant_of<Multiply<double, 16, 1, 16, 0, 1>, Step, true>(),
  };
};

template <class T, int kProducts>
struct MatrixUnitVariants {
  template <class Step>
  static constexpr Variant<Step> table[] = {
      // depth and how many warps share it: 64 and 128 of 128 columns, then 256, 512, 1024
      variant_of<MatrixUnit<T, 64, 1>, Step, false>(),
      variant_of<MatrixUnit<T, 128, 1>, Step, false>(),
      variant_of<MatrixUnit<T, 256, 1>, Step, true>(),
      variant_of<MatrixUnit<T, 512, kProducts>, Step, true>(),
      variant_of<MatrixUnit<T, 1024, kProducts == 1 ? 2 : 8>, Step, true>(),
  };
};
template <int kProducts>
struct VariantsOf<Bfloat16, kProducts> : MatrixUnitVariants<Bfloat16, kProducts> {};
template <int kProducts>
struct VariantsOf<Float16, kProducts> : MatrixUnitVariants<Float16, kProducts> {};

template <class Step>
Choice<Step> choose_sweep(const RnnSizes& sizes, int device, Regime wanted) {
  return choose<Step>(VariantsOf<typename Step::Storage, Step::kProducts>::template table<Step>, sizes.stack,
                      sizes.batch, sizes.hidden, device, wanted);
}

// The arguments that every launch of a call shares, for `members` members from `first` on.
inline SweepSizes sizes_of(const RnnSizes& sizes, int64_t first, int64_t members) {
  SweepSizes part{};
  part.time = static_cast<int>(sizes.time);
  part.batch = static_cast<int>(sizes.batch);
  part.hidden = static_cast<int>(sizes.hidden);
  part.members = static_cast<int>(members);
  part.lengths = sizes.lengths;
  for (int64_t s = 0; s < members; ++s)
    if (sizes.reverse[first + s] != 0) part.reverse[s / 32] |= uint32_t{1} << (s % 32);
  return part;
}

template <class Step>
void run_single_step(const RnnSizes& sizes, const RnnExecution& execution, const Step& whole_stack) {
  using T = typename Step::Storage;
  const int64_t plane = sizes.batch * sizes.hidden;
  for (int64_t first = 0; first < sizes.stack; first += kMaxMembers) {
    const int64_t members = std::min<int64_t>(kMaxMembers, sizes.stack - first);
    const SingleStepArgs<Step> args{sizes_of(sizes, first, members),
                                    static_cast<int>(execution.step),
                                    static_cast<const T*>(execution.sums) + first * plane,
                                    static_cast<T*>(execution.carried) + first * plane,
                                    sizes.stack * plane,
                                    whole_stack.from_member(first, sizes)};
    launch(single_step<Step>, {ceil_divide(members * plane, kThreads), kThreads}, execution.queue, args);
  }
}

// Runs the sweep: one launch, or one for as many members as fit.
template <class Step>
void run_sweep(const RnnSizes& sizes, const RnnExecution& execution, const Step& whole_stack) {
  using T = typename Step::Storage;
  if (sizes.stack == 0 || sizes.batch == 0 || sizes.hidden == 0) return;
  if (execution.regime == Regime::step) return run_single_step(sizes, execution, whole_stack);
  const Choice<Step> choice = choose_sweep<Step>(sizes, execution.queue.device, execution.regime);
  if (choice.variant == nullptr)
    throw std::invalid_argument("no kernel keeps weights of H=" + std::to_string(sizes.hidden) +
                                " on the chip; use regime 'step'");
  if (execution.workspace_bytes < choice.workspace_bytes)
    throw std::invalid_argument("workspace must have " + std::to_string(choice.workspace_bytes) + " bytes, got " +
                                std::to_string(execution.workspace_bytes));
  const Variant<Step>& variant = *choice.variant;
  const bool grid = choice.regime == Regime::grid;
  const int64_t rows = int64_t{choice.tiles} * variant.rows;
  const int64_t group_bytes = state_bytes(Step::kProducts, rows, variant.stride, sizeof(T));
  const int64_t shared_bytes = group_bytes + steps_bytes(rows) + int64_t{Step::kProducts} * variant.scratch_bytes;
  for (int64_t first = 0; first < sizes.stack; first += choice.members) {
    const int64_t members = std::min<int64_t>(choice.members, sizes.stack - first);
    SweepArgs<Step> args{sizes_of(sizes, first, members), {}, whole_stack.from_member(first, sizes)};
    args.sizes.groups = choice.groups;
    args.sizes.tiles = choice.tiles;
    args.sizes.shards = choice.shards;
    args.sizes.through_grid = grid;
    if (grid) {
      auto* const workspace = static_cast<char*>(execution.workspace);
      args.exchange.counters = reinterpret_cast<uint32_t*>(workspace) + first * choice.groups * kCounterStride;
      args.exchange.states =
          workspace + sizes.stack * choice.groups * kCounterStride * 4 + first * choice.groups * group_bytes;
    }
    launch(variant.kernel,
           {members * choice.groups * choice.shards, kThreads, static_cast<int>(shared_bytes),
            choice.regime == Regime::cluster ? choice.shards : 1, grid},
           execution.queue, args);
  }
}

}  // namespace tpext::cuda
