// What the recurrent sweeps share: the split into threads, row tiles and row blocks, the order of the steps, and the
// state of a row at a step.
//
// Rows (a member of the stack and a batch row) are independent through time: each thread takes a range of rows through
// all steps, tile by tile, and never waits for another within a sweep; only the packing of the weights before it is
// shared. Every row is computed by the same operations in the same order whatever its tile, thread or neighbours.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "core/rnn.h"
#include "cpu/microkernel.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Rows carried through time together: a state tile of 48 x H stays in the cache while the packed weights pass by.
constexpr int kTileRows = 48;
static_assert(kTileRows % kMaxRows == 0);
constexpr int kTileBlocks = kTileRows / kMaxRows + 1;

// [S] packed matrices and whether each is finite: a product with a zero row is skipped only if it is (0 * inf is NaN).
template <class T>
class PackedStack {
 public:
  PackedStack(const T* weight, bool transposed, const RnnSizes& sizes)
      : weight_(weight),
        transposed_(transposed),
        stack_(weight == nullptr ? 0 : sizes.stack),
        hidden_(sizes.hidden),
        panels_(panel_count<T>(sizes.hidden)),
        packed_(stack_ * panels_ * panel_stride()),
        finite_(stack_ * panels_) {}

  // To be called by every thread of a parallel region: shares the panels out and waits until all are packed.
  void pack() {
    const int64_t items = stack_ * panels_;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; ++i)
      finite_.get()[i] = pack_panel(weight_ + i / panels_ * hidden_ * hidden_, transposed_, hidden_, i % panels_,
                                    packed_.get() + i * panel_stride());
  }

  int64_t panel_stride() const { return hidden_ * kLanes<T>; }
  const T* panel(int64_t member, int64_t index) const {
    return packed_.get() + (member * panels_ + index) * panel_stride();
  }
  bool finite(int64_t member) const {
    bool all = true;
    for (int64_t p = 0; p < panels_; ++p) all = all && finite_.get()[member * panels_ + p];
    return all;
  }
  explicit operator bool() const { return stack_ != 0; }

 private:
  const T* weight_;
  bool transposed_;
  int64_t stack_, hidden_, panels_;
  Buffer<T> packed_;
  Buffer<bool> finite_;
};

#ifdef _OPENMP
inline int thread_index() { return omp_get_thread_num(); }
inline int thread_count() { return omp_get_num_threads(); }
#else
inline int thread_index() { return 0; }
inline int thread_count() { return 1; }
#endif

// Neighbouring rows of one member, taken through all steps together.
struct Tile {
  int64_t member, row, rows;
  int64_t blocks;

  int64_t block_begin(int64_t block) const { return part_begin(rows, blocks, block); }
};

// Threads worth waking: each gets at least 10^6 operations, some 10 microseconds.
inline int useful_threads(const RnnSizes& sizes, int products, int threads) {
  const double operations = 2.0 * static_cast<double>(sizes.stack * sizes.time * sizes.batch) *
                            static_cast<double>(sizes.hidden * (sizes.hidden * products + 16));
  const double rows = static_cast<double>(sizes.stack * sizes.batch);
  double most = operations / 1e6 + 1;
  most = most < rows ? most : rows;
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

// Calls visit(tile) for the tiles of one thread's share of the S * B rows.
template <class Visit>
inline void for_each_tile(const RnnSizes& sizes, int thread, int threads, const Visit& visit) {
  int64_t row = part_begin(sizes.stack * sizes.batch, threads, thread);
  const int64_t end = part_begin(sizes.stack * sizes.batch, threads, thread + 1);
  while (row < end) {
    const int64_t member = row / sizes.batch;
    const int64_t member_end = (member + 1) * sizes.batch < end ? (member + 1) * sizes.batch : end;
    const int64_t tiles = ceil_div(member_end - row, kTileRows);
    const int64_t rows = part_begin(member_end - row, tiles, 1);
    visit(Tile{member, row - member * sizes.batch, rows, ceil_div(rows, kMaxRows)});
    row += rows;
  }
}

inline int64_t valid_steps(const RnnSizes& sizes, int64_t row) {
  if (sizes.lengths == nullptr) return sizes.time;
  const int64_t length = sizes.lengths[row];
  return length < 0 ? 0 : length > sizes.time ? sizes.time : length;
}

// Panels [begin, end) of group `group`, with `groups` groups of nearly equal size for blocks of `rows` rows.
struct PanelGroups {
  int64_t panels, groups;

  PanelGroups(int64_t panel_total, int64_t rows)
      : panels(panel_total), groups(ceil_div(panel_total, max_panels(static_cast<int>(rows)))) {}
  int64_t begin(int64_t group) const { return part_begin(panels, groups, group); }
};

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
