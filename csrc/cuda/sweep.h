// One sweep over time, the skeleton of every recurrent kernel: a step multiplies the states of a few batch rows with
// weights that stay on the chip and turns the sums into the next states.
//
//     y_o[row] = sum_i state_i[row] M_io   (Step::Products, a Fan),      state'[row] = step(y[row], what it reads at t)
//
// A Step (rnn_scan.cu, rnn_target_scan.cu, gated_scan.cu, gated_target_scan.cu) holds the arrays and the elementwise
// work. What it hands to the next step of the same element alone, such as an LSTM's c, is its thread's own: Step::kOwn
// numbers that no other thread sees and no product takes. How the work is split:
//
//   block    a block has all columns, its rows' states lie in its shared memory, one block barrier a step.
//   cluster  the columns are spread over the blocks of a thread-block cluster; each thread stores what it computed in
//            the shared memory of all of them, one cluster barrier a step. sm_90.
//   grid     the same over blocks of a cooperative grid: states go through global memory, a counter is the barrier.
//
// exchange.h has what differs between the three. The rows of a member of the stack are dealt to groups (a block, or the
// blocks that share columns), in tiles of as many rows as a product takes; a group does all its tiles at a step, then
// one barrier.
//
// Memory of a block: the weights in registers (at most 128 a thread), 2 P rows stride states in shared memory, of P
// states. Traffic a step and row: what the Step says, read `kAhead` items before it is needed. What a step costs
// predicts `cycles_of_step` (plan.h).
//
// Deterministic: a sum's order depends on dtype, H and the kind of regime alone; rows do not touch each other; no float
// atomics.
#pragma once

#include "core/rnn.h"
#include "cuda/exchange.h"
#include "cuda/product.h"

namespace tpext::cuda {

// What a product multiplies by: M(k, n) is element [k][n], or where transposed [n][k].
template <class T>
struct Matrix {
  const T* elements;  // [S, count, H, H]
  bool transposed;
  int index = 0, count = 1;  // which of a member's
};

template <class Step>
struct SweepArgs {
  SweepSizes sizes;
  GridMemory grid;
  Step step;
};

// An element of a step: its offsets in [S, T, B, H] and in [S, B, H], and its column; whether the row takes part in
// this step, and whether the row's sweep begins or ends with it.
struct Position {
  int64_t element, initial;
  int column;
  bool valid, first, last;
};

// Where a step reads: its offset in [S, T, B, H], from there to that of the sweep's next step, its column, and its
// offset in [S, H]; whether the step is the first or the last of all.
struct Place {
  int64_t element, next;
  int column;
  int64_t unit;
  bool begins, ends;
};

// What arrives at an element: the sums, and what its thread kept.
template <class Step>
struct Arriving {
  using C = Compute<typename Step::Storage>;
  C sums[Step::Products::kSums];
  C own[Step::kOwn > 0 ? Step::kOwn : 1];
};

// Valid steps of a row of the batch.
__device__ inline int valid_steps(const SweepSizes& sizes, int row) {
  const int64_t count = sizes.lengths == nullptr ? sizes.time : sizes.lengths[row];
  return static_cast<int>(count < 0 ? 0 : count > sizes.time ? sizes.time : count);
}

__device__ inline bool runs_reversed(const SweepSizes& sizes, int member) {
  return (sizes.reverse[member / 32] >> (member % 32) & 1) != 0;
}

// A tile at a step: what a block works on at a time. `base`: of the group's first row in [S, T, B, H].
struct Item {
  int j, tile;
  int64_t base;
};

// What a block has of a launch: some rows of a member of the stack, and a shard of the columns.
template <class Product, class Step, bool kShared>
struct Share {
  const SweepSizes& sizes;
  int shard, group, member;  // group: of this launch
  int tiles, rows;           // of a group; some rows are beyond the batch
  int row_begin, column_begin;
  bool reverse, ascends;  // ascends: the sweep goes from step 0 on
  int64_t plane, next;    // B H; from an element to that of the sweep's next step

  __device__ __forceinline__ explicit Share(const SweepSizes& sizes)
      : sizes(sizes),
        shard(block_index() % sizes.shards),
        group(block_index() / sizes.shards % sizes.groups),
        member(block_index() / sizes.shards / sizes.groups),
        tiles(kShared ? sizes.tiles : 1),
        rows(tiles * Product::kRows),
        row_begin((sizes.first_group + group) * rows),
        column_begin(shard * Product::kColumns),
        reverse(runs_reversed(sizes, member)),
        ascends(reverse == Step::kBackward),
        plane(static_cast<int64_t>(sizes.batch) * sizes.hidden),
        next(ascends ? plane : -plane) {}

  // Of the group's first row, in [S, T, B, H] at step t and in [S, B, H].
  __device__ __forceinline__ int64_t element(int t) const {
    return (static_cast<int64_t>(member) * sizes.time + t) * plane + static_cast<int64_t>(row_begin) * sizes.hidden;
  }
  __device__ __forceinline__ int64_t initial() const {
    return static_cast<int64_t>(member) * plane + static_cast<int64_t>(row_begin) * sizes.hidden;
  }

  __device__ __forceinline__ Item first_item() const { return {0, 0, element(ascends ? 0 : sizes.time - 1)}; }
  __device__ __forceinline__ void advance(Item& item) const {
    if (++item.tile == tiles) {
      item.tile = 0;
      item.base += next;
      ++item.j;
    }
  }
};

// The weights, once. Beyond H both are zero, so that padding adds nothing.
template <class Product, class Step, bool kShared>
__device__ __forceinline__ void load_weights(const Step& step, const Share<Product, Step, kShared>& share,
                                             Product (&products)[Step::Products::kProducts]) {
  using T = typename Product::Storage;
  const int H = share.sizes.hidden;
#pragma unroll
  for (int p = 0; p < Step::Products::kProducts; ++p) {
    const Matrix<T> matrix = step.matrix(p);
    const T* const weights =
        matrix.elements + (static_cast<int64_t>(share.member) * matrix.count + matrix.index) * H * H;
    products[p].load([&](int k, int column) {
      const int n = share.column_begin + column;
      return k < H && n < H ? weights[matrix.transposed ? n * H + k : k * H + n] : T{};
    });
  }
}

// The first states, the padding of both copies, and the rows' steps.
template <class Product, class Step, bool kShared>
__device__ __forceinline__ void fill_memory(const Step& step, const Share<Product, Step, kShared>& share,
                                            const Memory<Product, Step>& memory) {
  constexpr int kStates = Step::Products::kStates, kStride = Product::kStride;
  const SweepSizes& sizes = share.sizes;
  const int rows = share.rows;
  for (int i = thread_index(); i < 2 * kStates * rows * kStride; i += kThreads) {
    const int k = i % kStride, row = share.row_begin + i / kStride % rows, turn_state = i / kStride / rows;
    memory.states[i] =
        turn_state < kStates && k < sizes.hidden && row < sizes.batch
            ? step.first_state((static_cast<int64_t>(share.member) * sizes.batch + row) * sizes.hidden + k)
            : typename Product::Storage{};
  }
  for (int r = thread_index(); r < rows; r += kThreads)
    memory.steps[r] = share.row_begin + r < sizes.batch ? valid_steps(sizes, share.row_begin + r) : 0;
}

// The elements that a thread computes in every tile.
template <class Product, class Step, bool kShared>
class Elements {
 public:
  static constexpr int kOutputs = Product::kOutputs;
  using Start = typename Step::Start;

  __device__ __forceinline__ Elements(const Step& step, const Share<Product, Step, kShared>& share, const int* steps)
      : step_(step), share_(share), steps_(steps), ragged_(share.sizes.lengths != nullptr) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const Output output = Product::output(thread_index(), i);
      row_[i] = output.row;
      column_[i] = share.column_begin + output.column;
      owned_[i] = Product::owns(thread_index()) && column_[i] < share.sizes.hidden;
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i)
      count_[i] =
          kShared || !ragged_ || !counts(0, i) ? share.sizes.time : valid_steps(share.sizes, share.row_begin + row_[i]);
  }

  // Before the sweep: what enters at a row's first step, where a block has one tile.
  __device__ __forceinline__ void read_starts() {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      starts_[i] = {};
      if (!kShared && counts(0, i)) starts_[i] = step_.start(share_.initial() + offset(0, i));
    }
  }

  // Whether output i is an element: there may be more than H columns, and rows beyond the batch.
  __device__ __forceinline__ bool counts(int tile, int i) const {
    return owned_[i] && row(tile, i) < share_.sizes.batch - share_.row_begin;
  }
  __device__ __forceinline__ int row(int tile, int i) const { return tile * Product::kRows + row_[i]; }
  __device__ __forceinline__ int column(int i) const { return column_[i]; }
  // Of the block's columns.
  __device__ __forceinline__ int own_column(int i) const { return column_[i] - share_.column_begin; }
  // From the group's first row.
  __device__ __forceinline__ int offset(int tile, int i) const {
    return row(tile, i) * share_.sizes.hidden + column_[i];
  }

  __device__ __forceinline__ Position position(const Item& item, int i) const {
    const int count = kShared && ragged_ ? steps_[row(item.tile, i)] : count_[i];
    const int begin = share_.ascends ? 0 : share_.sizes.time - count;
    return {item.base + offset(item.tile, i),
            share_.initial() + offset(item.tile, i),
            column_[i],
            static_cast<unsigned>(item.j - begin) < static_cast<unsigned>(count),
            item.j == begin,
            item.j + 1 == begin + count};
  }

  // What enters there: with several tiles it is read on the way.
  __device__ __forceinline__ Start start(const Position& at, int i) const {
    if (!kShared) return starts_[i];
    return at.first ? step_.start(at.initial) : Start{};
  }

 private:
  const Step& step_;
  const Share<Product, Step, kShared>& share_;
  const int* const steps_;
  const bool ragged_;
  // A row's steps: where a block has one tile, they stay in registers.
  int row_[kOutputs], column_[kOutputs], count_[kOutputs];
  bool owned_[kOutputs];
  Start starts_[kOutputs];
};

// What an item needs of global memory, read kAhead items before: a read takes up to 800 cycles, a step of one row some
// 400, of more rows or blocks longer. A wait for one read is a wait for all that were issued before. So the reads for
// several items are issued together into a second set, for the items after these; one item's are issued as soon as the
// last ones are used.
template <class Product, class Step, bool kShared>
class Reader {
 public:
  static constexpr int kOutputs = Product::kOutputs;
  static constexpr int kAhead = kShared ? 1 : Step::ahead(Product::kRows);
  using Loads = typename Step::Loads;

  __device__ __forceinline__ Reader(const Step& step, const Share<Product, Step, kShared>& share,
                                    const Elements<Product, Step, kShared>& elements)
      : step_(step), share_(share), elements_(elements), ahead_(share.first_item()) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) read(loads_[a]);
  }

  __device__ __forceinline__ const Loads& of(int a, int i) const { return loads_[a][i]; }

  // Before kAhead items, after each of them, and after all.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if constexpr (kTogether) read(coming_[a]);
  }
  __device__ __forceinline__ void used(int a) {
    if constexpr (!kTogether) read(loads_[a]);
  }
  __device__ __forceinline__ void end() {
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int i = 0; i < kOutputs; ++i)
        if constexpr (kTogether) loads_[a][i] = coming_[a][i];
  }

 private:
  static constexpr bool kTogether = kAhead > 1;

  __device__ __forceinline__ void read(Loads (&into)[kOutputs]) {
    if (ahead_.j >= share_.sizes.time) return;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i)
      if (elements_.counts(ahead_.tile, i))
        step_.load(into[i], {ahead_.base + elements_.offset(ahead_.tile, i), share_.next, elements_.column(i),
                             static_cast<int64_t>(share_.member) * share_.sizes.hidden + elements_.column(i),
                             ahead_.j == 0, ahead_.j + 1 == share_.sizes.time});
    share_.advance(ahead_);
  }

  const Step& step_;
  const Share<Product, Step, kShared>& share_;
  const Elements<Product, Step, kShared>& elements_;
  Item ahead_;  // the next one to be read
  Loads loads_[kAhead][kOutputs], coming_[kTogether ? kAhead : 1][kOutputs];
};

template <class Product, class Step>
__device__ __forceinline__ void multiply(Product (&products)[Step::Products::kProducts],
                                         const Memory<Product, Step>& memory, int turn, int tile,
                                         typename Product::Compute (&y)[Step::Products::kSums][Product::kOutputs]) {
  using Fan = typename Step::Products;
#pragma unroll
  for (int set = 0; set < Fan::kSets; ++set) {
    typename Product::Partial partials[Fan::kOut] = {};
    Product* const of_set = products + set * Fan::kIn * Fan::kOut;
#pragma unroll
    for (int in = 0; in < Fan::kIn; ++in)
      Product::accumulate(of_set + in * Fan::kOut,
                          memory.states + memory.at(turn, set * Fan::kIn + in, tile * Product::kRows), partials);
    Product::add_up(of_set, memory.scratch + set * Fan::kOut * Product::kScratchBytes, partials, y + set * Fan::kOut);
  }
}

// Of output i, an element.
template <class Product, class Step, bool kShared>
__device__ __forceinline__ Arriving<Step> arriving(
    const typename Product::Compute (&y)[Step::Products::kSums][Product::kOutputs], const Memory<Product, Step>& memory,
    const Elements<Product, Step, kShared>& elements, int tile, int i) {
  Arriving<Step> found;
#pragma unroll
  for (int p = 0; p < Step::Products::kSums; ++p) found.sums[p] = y[p][i];
#pragma unroll
  for (int o = 0; o < Step::kOwn; ++o) found.own[o] = memory.own_at(o, elements.row(tile, i), elements.own_column(i));
  return found;
}

// What threads keep, before the sweep.
template <class Product, class Step, bool kShared>
__device__ __forceinline__ void keep_first(const Step& step, const Share<Product, Step, kShared>& share,
                                           const Memory<Product, Step>& memory,
                                           const Elements<Product, Step, kShared>& elements) {
  if constexpr (Step::kOwn > 0) {
    for (int tile = 0; tile < share.tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < Product::kOutputs; ++i) {
        if (!elements.counts(tile, i)) continue;
#pragma unroll
        for (int o = 0; o < Step::kOwn; ++o)
          memory.own_at(o, elements.row(tile, i), elements.own_column(i)) =
              step.first_own(o, share.initial() + elements.offset(tile, i));
      }
    }
  }
}

// What comes out at the other end. The step that the sweep ended with was the row's first.
template <class Product, class Step, bool kShared>
__device__ __forceinline__ void finish(const Step& step, const Share<Product, Step, kShared>& share,
                                       const Memory<Product, Step>& memory,
                                       const Elements<Product, Step, kShared>& elements,
                                       Product (&products)[Step::Products::kProducts]) {
  using C = typename Product::Compute;
  const int turn = share.sizes.time & 1;
  for (int tile = 0; tile < share.tiles; ++tile) {
    C y[Step::Products::kSums][Product::kOutputs] = {};
    if constexpr (Step::kBackward) multiply(products, memory, turn, tile, y);
#pragma unroll
    for (int i = 0; i < Product::kOutputs; ++i) {
      if (!elements.counts(tile, i)) continue;
      const int row = elements.row(tile, i), steps = memory.steps[row], offset = elements.offset(tile, i);
      const Position first{share.element(share.reverse ? steps - 1 : 0) + offset,
                           share.initial() + offset,
                           elements.column(i),
                           steps > 0,
                           false,
                           false};
      step.finish(first, arriving(y, memory, elements, tile, i),
                  memory.states[memory.at(turn, 0, row, elements.column(i))]);
    }
  }
}

template <class Product, class Step, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) sweep(const __grid_constant__ SweepArgs<Step> args) {
  using T = typename Product::Storage;
  using C = typename Product::Compute;
  constexpr int kOutputs = Product::kOutputs;
  using Exchange = std::conditional_t<kShared, SharedStates<Product, Step>, OwnStates<Product, Step>>;
  const Step& step = args.step;
  const Share<Product, Step, kShared> share(args.sizes);
  const Memory<Product, Step> memory(share.rows);
  const Exchange exchange(args.sizes, args.grid, memory, share.member * args.sizes.groups + share.group);
  Product products[Step::Products::kProducts];
  load_weights(step, share, products);
  Elements<Product, Step, kShared> elements(step, share, memory.steps);
  fill_memory(step, share, memory);
  keep_first(step, share, memory, elements);
  elements.read_starts();
  Reader<Product, Step, kShared> reader(step, share, elements);
  exchange.begin();

  for (Item item = share.first_item(); item.j < args.sizes.time;) {
    reader.begin();
#pragma unroll
    for (int a = 0; a < reader.kAhead; ++a) {
      if (item.j >= args.sizes.time) break;
      const int turn = item.j & 1;
      const bool ends_step = item.tile + 1 == share.tiles;
      C y[Step::Products::kSums][kOutputs];
      multiply(products, memory, turn, item.tile, y);
      typename Step::Result results[kOutputs];
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        if (!elements.counts(item.tile, i)) continue;
        const int row = elements.row(item.tile, i), column = elements.column(i);
        const Position at = elements.position(item, i);
        results[i] =
            step.advance(reader.of(a, i), elements.start(at, i), at, arriving(y, memory, elements, item.tile, i));
        if constexpr (Step::kOwn > 0) {
#pragma unroll
          for (int o = 0; o < Step::kOwn; ++o)
            if (at.valid) memory.own_at(o, row, elements.own_column(i)) = results[i].own[o];
        }
#pragma unroll
        for (int p = 0; p < Step::Products::kStates; ++p) {
          // A row keeps its state before its first step and after its last.
          const T kept =
              at.valid ? from_compute<T>(results[i].carried[p]) : memory.states[memory.at(turn, p, row, column)];
          exchange.pass_on(turn ^ 1, p, row, column, kept);
        }
      }
      exchange.arrive(ends_step);
#pragma unroll
      for (int i = 0; i < kOutputs; ++i)
        if (elements.counts(item.tile, i)) step.store(results[i], elements.position(item, i));
      reader.used(a);
      exchange.wait(turn ^ 1, item.j + 1, ends_step);
      share.advance(item);
    }
    reader.end();
  }
  finish(step, share, memory, elements, products);
}

// The elementwise work of one step, number `at_step`, for weights that stay nowhere. A thread an element.
template <class Step>
struct SingleStepArgs {
  SweepSizes sizes;
  int at_step;
  const typename Step::Storage* sums;  // [sets, S, B, out, H]
  typename Step::Storage* carried;     // [sets, S, B, in, H]
  int64_t stride;                      // S B H
  Step step;
};

// Of an element of [S, B, H], the offset in [sets, S, B, count, H] of number p of all sets.
TPEXT_HOST_DEVICE inline int64_t among(int p, int count, int64_t stride, int64_t element, int column, int hidden) {
  return p / count * stride * count + (element - column) * count + column + p % count * static_cast<int64_t>(hidden);
}

template <class Step>
__global__ void __launch_bounds__(kThreads) single_step(const __grid_constant__ SingleStepArgs<Step> args) {
  using T = typename Step::Storage;
  using Fan = typename Step::Products;
  const SweepSizes& sizes = args.sizes;
  const int64_t plane = static_cast<int64_t>(sizes.batch) * sizes.hidden;
  const int64_t element = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (element >= sizes.members * plane) return;
  const int member = static_cast<int>(element / plane), row = static_cast<int>(element % plane / sizes.hidden);
  const int column = static_cast<int>(element % sizes.hidden);
  const bool reverse = runs_reversed(sizes, member);
  const int count = valid_steps(sizes, row);
  Arriving<Step> arriving;
#pragma unroll
  for (int p = 0; p < Fan::kSums; ++p)
    arriving.sums[p] = to_compute(args.sums[among(p, Fan::kOut, args.stride, element, column, sizes.hidden)]);
  if constexpr (Step::kOwn > 0) {
#pragma unroll
    for (int o = 0; o < Step::kOwn; ++o)
      arriving.own[o] = args.at_step == 0 ? args.step.first_own(o, element) : to_compute(args.step.own(o)[element]);
  }
  const int64_t base = static_cast<int64_t>(member) * sizes.time, in_plane = element % plane;
  if (args.at_step == sizes.time) {
    const int64_t first_step = base + (reverse ? count - 1 : 0);
    args.step.finish({first_step * plane + in_plane, element, column, count > 0, false, false}, arriving,
                     args.carried[among(0, Fan::kIn, args.stride, element, column, sizes.hidden)]);
    return;
  }
  const bool ascends = reverse == Step::kBackward;
  const int t = ascends ? args.at_step : sizes.time - 1 - args.at_step;
  const int begin = ascends ? 0 : sizes.time - count;
  const Position at{(base + t) * plane + in_plane,
                    element,
                    column,
                    args.at_step >= begin && args.at_step - begin < count,
                    args.at_step == begin,
                    args.at_step + 1 == begin + count};
  typename Step::Loads loads;
  args.step.load(loads,
                 {at.element, ascends ? plane : -plane, column, static_cast<int64_t>(member) * sizes.hidden + column,
                  args.at_step == 0, args.at_step + 1 == sizes.time});
  const typename Step::Start start = at.first ? args.step.start(element) : typename Step::Start{};
  const typename Step::Result result = args.step.advance(loads, start, at, arriving);
  args.step.store(result, at);
  if constexpr (Step::kOwn > 0) {
#pragma unroll
    for (int o = 0; o < Step::kOwn; ++o)
      args.step.own(o)[element] = from_compute<T>(at.valid ? result.own[o] : arriving.own[o]);
  }
  if (!at.valid) return;
#pragma unroll
  for (int p = 0; p < Fan::kStates; ++p)
    args.carried[among(p, Fan::kIn, args.stride, element, column, sizes.hidden)] = from_compute<T>(result.carried[p]);
}

}  // namespace tpext::cuda
