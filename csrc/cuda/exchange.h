// A block's memory in a sweep (cuda/sweep.h), and how the blocks of a group tell each other the states of the next
// step: not at all, through the shared memory of a cluster, or through global memory.
#pragma once

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

// What a step multiplies: kSets sets of kIn states, of which each gives kOut sums, y_o = sum_i state_i M_io. The states
// of a simple cell are sets of their own; gates are what one state fans out to, or what fans in to one sum.
template <int kSetCount, int kInCount, int kOutCount>
struct Fan {
  static constexpr int kSets = kSetCount, kIn = kInCount, kOut = kOutCount;
  static constexpr int kStates = kSets * kIn, kSums = kSets * kOut, kProducts = kSets * kIn * kOut;
};

// Bytes of shared memory of a block: states, the rows' steps, scratch of the sums, what threads keep to themselves.
TPEXT_HOST_DEVICE constexpr int64_t state_bytes(int states, int64_t rows, int stride, int element_bytes) {
  return 2 * states * rows * stride * element_bytes;
}
TPEXT_HOST_DEVICE constexpr int64_t steps_bytes(int64_t rows) { return (rows * 4 + 15) / 16 * 16; }
TPEXT_HOST_DEVICE constexpr int64_t own_bytes(int own, int64_t rows, int columns, int compute_bytes) {
  return own * rows * columns * compute_bytes;
}

// The shared memory of a block. Two copies of the states in turns: what a step writes is read at the next, and nobody
// still reads what it overwrites.
template <class Product, class Step>
struct Memory {
  using T = typename Product::Storage;
  using C = typename Product::Compute;
  static constexpr int kStates = Step::Products::kStates;
  int rows;
  T* states;      // [2, P, rows, stride]
  int* steps;     // [rows] valid steps
  char* scratch;  // of each sum
  C* own;         // [O, rows, columns] what a step hands to the next of the same element: its thread's alone

  __device__ __forceinline__ explicit Memory(int rows)
      : rows(rows),
        states(reinterpret_cast<T*>(shared_memory())),
        steps(reinterpret_cast<int*>(states + 2 * kStates * rows * Product::kStride)),
        scratch(reinterpret_cast<char*>(steps) + steps_bytes(rows)),
        own(reinterpret_cast<C*>(scratch + Step::Products::kSums * Product::kScratchBytes)) {}

  __device__ __forceinline__ int at(int turn, int p, int row = 0, int column = 0) const {
    return ((turn * kStates + p) * rows + row) * Product::kStride + column;
  }
  // `column` of the block's.
  __device__ __forceinline__ C& own_at(int o, int row, int column) const {
    return own[(o * rows + row) * Product::kColumns + column];
  }
};

// What blocks of the grid regime share: a counter a group, 128 bytes apart, then its states [2][P][rows][stride].
struct GridMemory {
  uint32_t* counters;
  void* states;
};
constexpr int64_t kCounterStride = 32;

// An exchange: begin() before the first step, then at every item (a tile at a step) pass_on() what was computed,
// arrive() once that is done, and wait() before the next item's product. What other threads wait for goes before
// arrive(), what only memory gets after: an arrival among blocks waits for the writes before it.

// Of a block that has all columns.
template <class Product, class Step>
class OwnStates {
 public:
  using Block = Memory<Product, Step>;
  using T = typename Product::Storage;
  __device__ __forceinline__ OwnStates(const SweepSizes&, const GridMemory&, const Block& memory, int)
      : memory_(memory) {}

  __device__ __forceinline__ void begin() const { block_barrier(); }
  __device__ __forceinline__ void pass_on(int turn, int p, int row, int column, T value) const {
    memory_.states[memory_.at(turn, p, row, column)] = value;
  }
  __device__ __forceinline__ void arrive(bool) const { block_barrier(); }
  __device__ __forceinline__ void wait(int, int, bool) const {}

 private:
  const Block& memory_;
};

// Of blocks that share the columns of a group, whose number it is in the launch.
template <class Product, class Step>
class SharedStates {
 public:
  using Block = Memory<Product, Step>;
  using T = typename Product::Storage;
  __device__ __forceinline__ SharedStates(const SweepSizes& sizes, const GridMemory& grid, const Block& memory,
                                          int group)
      : sizes_(sizes),
        memory_(memory),
        exchanged_(static_cast<T*>(grid.states) + static_cast<int64_t>(group) * 2 * copy_size()),
        counter_(grid.counters + static_cast<int64_t>(group) * kCounterStride) {}

  // No block may write to another's shared memory before that one is done with its padding.
  __device__ __forceinline__ void begin() const {
    if (sizes_.through_grid) return block_barrier();
    cluster_arrive();
    cluster_wait();
  }

  __device__ __forceinline__ void pass_on(int turn, int p, int row, int column, T value) const {
    const int at = memory_.at(turn, p, row, column);
    if (sizes_.through_grid) {
      exchanged_[at] = value;
    } else {
      for (int s = 0; s < sizes_.shards; ++s) *in_cluster(memory_.states + at, s) = value;
    }
  }

  __device__ __forceinline__ void arrive(bool ends_step) const {
    if (!ends_step) return;
    if (!sizes_.through_grid) return cluster_arrive();
    block_barrier();
    if (thread_index() == 0) add_release(counter_, 1);
  }

  // Until all have computed `steps` steps; then copy `turn` of the states is there.
  __device__ __forceinline__ void wait(int turn, int steps, bool ends_step) const {
    if (!ends_step) return;
    if (!sizes_.through_grid) return cluster_wait();
    if (thread_index() == 0)
      while (load_acquire(counter_) < static_cast<uint32_t>(sizes_.shards) * static_cast<uint32_t>(steps)) spin();
    block_barrier();
    fetch(turn);
    block_barrier();
  }

 private:
  __device__ __forceinline__ int copy_size() const { return Block::kStates * memory_.rows * Product::kStride; }

  __device__ __forceinline__ void fetch(int turn) const {
    static_assert(Product::kStride * sizeof(T) % sizeof(Words) == 0);
    const int64_t begin = static_cast<int64_t>(turn) * copy_size();
    const auto* const from = reinterpret_cast<const Words*>(exchanged_ + begin);
    auto* const to = reinterpret_cast<Words*>(memory_.states + memory_.at(turn, 0));
    const int words = copy_size() * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(Words));
    for (int i = thread_index(); i < words; i += kThreads) to[i] = load_shared_by_grid(from + i);
  }

  const SweepSizes& sizes_;  // not copies, by which the compiler would double the sweep's loop
  const Block& memory_;
  T* const exchanged_;
  uint32_t* const counter_;
};

}  // namespace tpext::cuda
