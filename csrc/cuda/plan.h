// From the sizes of a recurrent call to launches of a sweep: which regime, which way to multiply, how many groups,
// tiles and blocks. The table of variants and the prediction `cycles_of_step` decide; until measured they are
// predictions.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/sweep.h"

namespace tpext::cuda {

// One way to multiply, as the choice and the launch see it.
template <class Step>
struct Variant {
  void (*kernel)(SweepArgs<Step>);
  bool shared;
  int rows, depth, columns, stride, scratch_bytes, cycles;

  // Of a group of so many rows: its states, and all that a block of it has in shared memory.
  int64_t state_bytes(int64_t group_rows) const {
    return cuda::state_bytes(Step::Products::kStates, group_rows, stride, sizeof(typename Step::Storage));
  }
  int64_t shared_bytes(int64_t group_rows) const {
    return state_bytes(group_rows) + steps_bytes(group_rows) + int64_t{Step::Products::kSums} * scratch_bytes +
           own_bytes(Step::kOwn, group_rows, columns, sizeof(Compute<typename Step::Storage>));
  }
};

// Predicted cycles of a step: the chain of dependent operations, and the products, which it hides at best where blocks
// share a multiprocessor. Not measured yet.
inline double cycles_of_step(Regime regime, double product_cycles, int64_t blocks_side_by_side) {
  // Read the states 45, add up and shuffle 80, the elementwise work 130, write, barrier and read addresses 145; what
  // blocks tell each other through a cluster, with its fence, or through a grid, with release, acquire and reads.
  const double latency = 400 + (regime == Regime::cluster ? 1000 : regime == Regime::grid ? 3500 : 0);
  return std::max(latency + product_cycles, product_cycles * static_cast<double>(blocks_side_by_side));
}

// How a call is run.
template <class Step>
struct Choice {
  const Variant<Step>* variant = nullptr;
  Regime regime = Regime::step;
  int groups = 0, tiles = 0, shards = 0;
  int members = 0, groups_at_once = 0;  // of a launch
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
  const Limits& limit = limits(device);
  Choice<Step> choice;
  const int64_t shards = variant.shared ? ceil_divide(hidden, variant.columns) : 1;
  const bool grid = regime == Regime::grid;
  if (hidden > variant.depth || variant.shared != (regime != Regime::block)) return choice;
  if (!variant.shared && hidden > variant.columns) return choice;
  if (regime == Regime::cluster && (limit.capability < 90 || shards > 16)) return choice;
  if (grid && !limit.cooperative) return choice;

  // As many rows as shared memory holds.
  const auto shared_bytes = [&](int64_t tiles) { return variant.shared_bytes(tiles * variant.rows); };
  int64_t most_tiles = 0;
  while ((variant.shared || most_tiles == 0) && shared_bytes(most_tiles + 1) <= limit.shared_memory) ++most_tiles;
  if (most_tiles == 0) return choice;

  // Groups that run side by side, whatever their tiles. Blocks that share weights have a multiprocessor each: what
  // registers leave room for differs between kernels, and a plan made for one is to suit another.
  const int cluster = regime == Regime::cluster ? static_cast<int>(shards) : 1;
  int64_t at_once =
      resident(variant.kernel, {shards, kThreads, static_cast<int>(shared_bytes(most_tiles)), cluster, grid}, device);
  if (grid) at_once = std::min<int64_t>(at_once, limit.multiprocessors) / shards;
  if (at_once < 1) return choice;

  // More tiles a group only where there are more rows than groups at once.
  const int64_t tiles_of_batch = ceil_divide(batch, variant.rows);
  int64_t members = std::min<int64_t>(stack, kMaxMembers);
  const int64_t wanted = variant.shared ? std::max<int64_t>(1, at_once / members) : tiles_of_batch;
  const int64_t tiles = std::clamp<int64_t>(ceil_divide(tiles_of_batch, wanted), 1, most_tiles);
  const int64_t groups = ceil_divide(tiles_of_batch, tiles);
  // All blocks of a grid run at once: fewer members a launch, or fewer groups.
  const int64_t groups_at_once = grid ? std::min(groups, at_once) : groups;
  if (grid) members = std::min(members, at_once / groups_at_once);
  const int64_t rounds =
      grid ? ceil_divide(stack, members) * ceil_divide(groups, groups_at_once) : ceil_divide(stack * groups, at_once);
  const int64_t blocks = std::min(stack * groups, at_once) * shards;
  choice.variant = &variant;
  choice.regime = regime;
  choice.groups = static_cast<int>(groups);
  choice.groups_at_once = static_cast<int>(groups_at_once);
  choice.tiles = static_cast<int>(tiles);
  choice.shards = static_cast<int>(shards);
  choice.members = static_cast<int>(members);
  if (grid) choice.workspace_bytes = stack * groups * (kCounterStride * 4 + variant.state_bytes(tiles * variant.rows));
  choice.cycles =
      static_cast<double>(rounds) *
      cycles_of_step(regime, double{Step::Products::kProducts} * static_cast<double>(tiles) * variant.cycles,
                     ceil_divide(blocks, limit.multiprocessors));
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
      // Of the least depth that fits alone: so neither this nor the regime, and with them the order of a sum, depends
      // on the batch.
      if (best.variant != nullptr && variant.depth > best.variant->depth) break;
      const Choice<Step> choice = fit(variant, regime, stack, batch, hidden, device);
      if (choice.variant != nullptr && (best.variant == nullptr || choice.cycles < best.cycles)) best = choice;
    }
    if (best.variant != nullptr) return best;
  }
  if (wanted != Regime::automatic)
    throw std::invalid_argument(std::string("regime '") + regime_name(wanted) +
                                "' cannot run H=" + std::to_string(hidden) + ", B=" + std::to_string(batch) + " with " +
                                std::to_string(Step::Products::kProducts) +
                                " products a step in this dtype on device " + std::to_string(device));
  return best;
}

template <class Product, class Step, bool kShared>
constexpr Variant<Step> variant_of() {
  return {sweep<Product, Step, kShared>,
          kShared,
          Product::kRows,
          Product::kDepth,
          Product::kColumns,
          Product::kStride,
          Product::kScratchBytes,
          Product::kCycles};
}

// The variants of a storage type and number of products. Registers bound them: depth x columns x products weights of
// 256 threads, at most 128 registers a thread.
//
// Gates are G matrices (3 or 4), through time 2 G, and a block holds its columns of all of them: in float32 all columns
// up to H = 64 (4 x 64 x 64 weights are 64 registers of each thread, through time 128), and from there on the columns
// go to more blocks: 2, 8 and 32 for H up to 128, 256 and 512, through time 8, 16 and 64. What does not fit could stand
// in shared memory instead, 128 bytes of which a multiprocessor reads in a cycle: half of an LSTM's 4 x 100 x 100
// floats would take 625 cycles a step and row tile, besides the products. A cluster's exchange takes 1000 a step
// whatever the number of tiles, and halves the products; on sm_80, which has no clusters, the grid pays 3500. So
// weights stay in registers alone.
template <class T, int kProducts>
struct VariantsOf;

template <int kProducts>
  requires(kProducts <= 2)
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
      variant_of<Multiply<float, 16, 4 / kProducts, 8, 0, 1>, Step, true>(),
      variant_of<Multiply<float, 16, 4 / kProducts, 8, 0, 4>, Step, true>(),
      variant_of<Multiply<float, 16, 2 / kProducts, 16, 0, 4>, Step, true>(),
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
      variant_of<MatrixUnit<T, 256, kProducts>, Step, true>(),
      variant_of<MatrixUnit<T, 512, kProducts == 1 ? 1 : 4>, Step, true>(),
      variant_of<MatrixUnit<T, 1024, kProducts == 1 ? 2 : 8>, Step, true>(),
  };
};
template <int kProducts>
  requires(kProducts <= 2)
struct VariantsOf<Bfloat16, kProducts> : MatrixUnitVariants<Bfloat16, kProducts> {};
template <int kProducts>
  requires(kProducts <= 2)
struct VariantsOf<Float16, kProducts> : MatrixUnitVariants<Float16, kProducts> {};

// Of gates, 4 or 8 matrices; 3 and 6 take the same. Beyond the last depth every step is a product of torch's.
template <class T, int kMatrices>
struct GateVariants;

template <int kMatrices>
struct GateVariants<float, kMatrices> {
  static constexpr int kHalves = kMatrices / 4;
  template <class Step>
  static constexpr Variant<Step> table[] = {
      // depth 64 of as many columns, then 128, 256, 512
      variant_of<Multiply<float, 8, 2, 2, 0, 1>, Step, false>(),
      variant_of<Multiply<float, 8, 2, 2, 0, 4>, Step, false>(),
      variant_of<Multiply<float, 8 * kHalves, 2 / kHalves, 4 / kHalves, 0, 1>, Step, true>(),
      variant_of<Multiply<float, 8 * kHalves, 2 / kHalves, 4 / kHalves, 0, 4>, Step, true>(),
      variant_of<Multiply<float, 8 * kHalves, 1, 8 / kHalves, 0, 4>, Step, true>(),
      variant_of<Multiply<float, 16 * kHalves, 1, 8 / kHalves, 0, 4>, Step, true>(),
  };
};

template <>
struct GateVariants<double, 4> {
  template <class Step>
  static constexpr Variant<Step> table[] = {
      variant_of<Multiply<double, 8, 2, 4, 0, 1>, Step, false>(),
      variant_of<Multiply<double, 8, 1, 8, 0, 1>, Step, true>(),
      variant_of<Multiply<double, 16, 1, 8, 0, 1>, Step, true>(),
  };
};

template <>
struct GateVariants<double, 8> {
  template <class Step>
  static constexpr Variant<Step> table[] = {
      variant_of<Multiply<double, 8, 1, 2, 0, 1>, Step, false>(),
      variant_of<Multiply<double, 16, 1, 4, 0, 1>, Step, true>(),
      variant_of<Multiply<double, 32, 1, 4, 0, 1>, Step, true>(),
  };
};

// Threads of the matrix units have up to four units to step, and all that a step of these reads: half of the registers
// are left to that, but where a GRU's three matrices fit one block.
template <class T, int kProducts>
struct MatrixUnitGates {
  static constexpr bool kFits = kProducts == 3;
  template <class Step>
  static constexpr Variant<Step> table[] = {
      variant_of<MatrixUnit<T, 64, 1>, Step, false>(),
      variant_of<MatrixUnit<T, 128, kFits ? 1 : 2>, Step, !kFits>(),
      variant_of<MatrixUnit<T, 256, 4>, Step, true>(),
      variant_of<MatrixUnit<T, 512, 8>, Step, true>(),
  };
};

template <class T, int kProducts>
  requires(kProducts > 4)
struct MatrixUnitGates<T, kProducts> {
  template <class Step>
  static constexpr Variant<Step> table[] = {
      variant_of<MatrixUnit<T, 64, 2>, Step, false>(),
      variant_of<MatrixUnit<T, 128, 4>, Step, true>(),
      variant_of<MatrixUnit<T, 256, 8>, Step, true>(),
  };
};

template <class T, int kProducts>
  requires(kProducts > 2)
struct VariantsOf<T, kProducts> : GateVariants<T, kProducts <= 4 ? 4 : 8> {};
template <int kProducts>
  requires(kProducts > 2)
struct VariantsOf<Bfloat16, kProducts> : MatrixUnitGates<Bfloat16, kProducts> {};
template <int kProducts>
  requires(kProducts > 2)
struct VariantsOf<Float16, kProducts> : MatrixUnitGates<Float16, kProducts> {};

template <class Step>
Choice<Step> choose_sweep(const RnnSizes& sizes, int device, Regime wanted) {
  return choose<Step>(VariantsOf<typename Step::Storage, Step::Products::kProducts>::template table<Step>, sizes.stack,
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
                                    static_cast<const T*>(execution.sums) + first * plane * Step::Products::kOut,
                                    static_cast<T*>(execution.carried) + first * plane * Step::Products::kIn,
                                    sizes.stack * plane,
                                    whole_stack.from_member(first, sizes)};
    launch(single_step<Step>, {ceil_divide(members * plane, kThreads), kThreads}, execution.queue, args);
  }
}

// Runs the sweep: one launch, or one for as many members as fit.
template <class Step>
void run_sweep(const RnnSizes& sizes, const RnnExecution& execution, const Step& whole_stack) {
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
  const int64_t group_bytes = variant.state_bytes(rows), shared_bytes = variant.shared_bytes(rows);
  for (int64_t first = 0; first < sizes.stack; first += choice.members)
    for (int64_t group = 0; group < choice.groups; group += choice.groups_at_once) {
      const int64_t members = std::min<int64_t>(choice.members, sizes.stack - first);
      SweepArgs<Step> args{sizes_of(sizes, first, members), {}, whole_stack.from_member(first, sizes)};
      args.sizes.first_group = static_cast<int>(group);
      args.sizes.groups = static_cast<int>(std::min<int64_t>(choice.groups_at_once, choice.groups - group));
      args.sizes.tiles = choice.tiles;
      args.sizes.shards = choice.shards;
      args.sizes.through_grid = grid;
      if (grid) {
        // Either all groups of some members, or some of one member's: what a launch shares lies side by side.
        auto* const workspace = static_cast<char*>(execution.workspace);
        const int64_t before = first * choice.groups + group;
        args.grid.counters = reinterpret_cast<uint32_t*>(workspace) + before * kCounterStride;
        args.grid.states = workspace + sizes.stack * choice.groups * kCounterStride * 4 + before * group_bytes;
      }
      launch(variant.kernel,
             {members * args.sizes.groups * choice.shards, kThreads, static_cast<int>(shared_bytes),
              choice.regime == Regime::cluster ? choice.shards : 1, grid},
             execution.queue, args);
    }
}

}  // namespace tpext::cuda
