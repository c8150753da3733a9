// One sweep from the last valid step to the first, then to the initial state: the skeleton of back-propagation through
// time and of the target passes.
//
// At each position a row has up to two products at hand, of what the sweep left at the position before:
//     displaced = z_{t+1} P   (P packed in `inverse`),    credit = e_{t+1} W   (W packed in `weight`)
// and a Step turns them, with what it reads itself at t, into the step's delta e_t and carried z_t:
//     Stepped step(at, column, count, displaced, credit),   Vec step.initial(at, column, count, displaced, credit)
// z lives in two row tiles of scratch memory, e in the output; a product whose rows are all zero is not computed, which
// changes no bit as long as the matrix is finite.
#pragma once

#include "cpu/sweep.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

enum class Place {
  padding,  // past the row's valid steps: every output is zero
  last,     // the last valid step of the recursion, where the sweep begins
  inner,
  initial,  // before the first step
  none,     // the initial state of a row without a valid step
};

// Where a row stands: offsets of its first column in [S, T, B, H] arrays at this step and at the one the sweep comes
// from, and in [S, B, H] arrays.
struct RowStep {
  Place place;
  int64_t current, source, initial;
};

template <class T>
struct Stepped {
  Vec<T> delta, carried, displacement;  // e_t; z_t as the next product takes it; d_t, for the norms
};

template <class T>
struct BackwardOutputs {
  T* delta;    // [S, T, B, H]
  T* initial;  // [S, B, H]
  T* norms;    // [S, T, B] of d_t, or null
  T* carried;  // [S, T, B, H] z_t, or null
};

// Scratch numbers that one thread needs for the target passes: two tiles of z, one of d if norms are wanted.
template <class T>
inline int64_t backward_scratch(const RnnSizes& sizes, bool norms) {
  return (norms ? 3 : 2) * kTileRows * panel_count<T>(sizes.hidden) * kLanes<T>;
}

// Euclidean norm without overflow or underflow, and in one order of summation for every row.
template <class T>
inline T row_norm(const T* row, int64_t count) {
  T largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T size = row[i] < 0 ? -row[i] : row[i];
    if (size != size) return size;
    if (size > largest) largest = size;
  }
  if (largest == 0 || largest > Constants<T>::largest) return largest;
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += (row[i] / largest) * (row[i] / largest);
  return largest * (sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(sum)))
                                   : static_cast<T>(__builtin_sqrt(static_cast<double>(sum))));
}

template <class T, class Step>
void backward_tile(const RnnSizes& sizes, const Tile& tile, const PackedStack<T>& inverse, const PackedStack<T>& weight,
                   const Step& step, const BackwardOutputs<T>& outputs, T* scratch) {
  const int64_t H = sizes.hidden, stride = panel_count<T>(H) * kLanes<T>;
  const bool reverse = sizes.reverse[tile.member] != 0;
  const PanelGroups groups(panel_count<T>(H), ceil_div(tile.rows, tile.blocks));
  const bool dense_inverse = Step::displaces && !inverse.finite(tile.member);
  const bool dense_weight = weight && !weight.finite(tile.member);
  T* z_new = scratch;
  T* z_old = Step::displaces ? z_new + kTileRows * stride : nullptr;
  T* d_rows = Step::displaces ? z_old + kTileRows * stride : nullptr;
  // Whether a block's z and e of the position before have a number that is not zero.
  bool z_alive[kTileBlocks] = {}, e_alive[kTileBlocks] = {};
  int64_t steps[kTileRows];
  for (int64_t r = 0; r < tile.rows; ++r) steps[r] = valid_steps(sizes, tile.row + r);

  for (int64_t j = 0; j <= sizes.time; ++j) {
    const int64_t t = reverse ? j : sizes.time - 1 - j;
    const int64_t source = reverse ? j - 1 : sizes.time - j;
    RowStep at[kTileRows];
    const T* z_rows[kTileRows];
    const T* e_rows[kTileRows];
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r;
      const bool before_first = reverse ? j == steps[r] : j == sizes.time;
      const bool valid = j < sizes.time && t < steps[r];
      at[r].place = before_first                             ? (steps[r] == 0 ? Place::none : Place::initial)
                    : !valid                                 ? Place::padding
                    : (reverse ? t == 0 : t == steps[r] - 1) ? Place::last
                                                             : Place::inner;
      at[r].current = ((tile.member * sizes.time + t) * sizes.batch + row) * H;
      at[r].source = ((tile.member * sizes.time + source) * sizes.batch + row) * H;
      at[r].initial = (tile.member * sizes.batch + row) * H;
      if (Step::displaces) z_rows[r] = z_old + r * stride;
      e_rows[r] = outputs.delta + at[r].source;
    }
    Bits<T> z_bits[kTileBlocks] = {}, e_bits[kTileBlocks] = {};
    for (int64_t group = 0; group < groups.groups; ++group) {
      const int64_t panel = groups.begin(group);
      const int panels = static_cast<int>(groups.begin(group + 1) - panel);
      for (int64_t block = 0; block < tile.blocks; ++block) {
        const int64_t row = tile.block_begin(block);
        const int rows = static_cast<int>(tile.block_begin(block + 1) - row);
        Vec<T> displaced[kMaxRows * kMaxPanels], credit[kMaxRows * kMaxPanels];
        const bool use_inverse = Step::displaces && j > 0 && (z_alive[block] || dense_inverse);
        const bool use_weight = weight && j > 0 && (e_alive[block] || dense_weight);
        if (use_inverse)
          find_product<T>(rows, panels)(H, z_rows + row, inverse.panel(tile.member, panel), inverse.panel_stride(),
                                        displaced);
        if (use_weight)
          find_product<T>(rows, panels)(H, e_rows + row, weight.panel(tile.member, panel), weight.panel_stride(),
                                        credit);
        for (int64_t r = row; r < row + rows; ++r) {
          for (int p = 0; p < panels; ++p) {
            const int64_t column = (panel + p) * kLanes<T>, count = H - column;
            const int64_t sum = (r - row) * kMaxPanels + p;
            const Vec<T> moved = use_inverse ? displaced[sum] : Vec<T>{};
            // Nothing follows a row's last valid step; what stands there is padding times a weight that may be
            // infinite.
            const Vec<T> owed = use_weight && at[r].place != Place::last ? credit[sum] : Vec<T>{};
            Stepped<T> stepped = {};
            if (at[r].place == Place::last || at[r].place == Place::inner)
              stepped = step(at[r], column, count, moved, owed);
            else if (at[r].place == Place::initial)
              store_part(outputs.initial + at[r].initial + column, step.initial(at[r], column, count, moved, owed),
                         count);
            else if (at[r].place == Place::none)
              store_part(outputs.initial + at[r].initial + column, Vec<T>{}, count);
            if (j == sizes.time) continue;
            store_part(outputs.delta + at[r].current + column, stepped.delta, count);
            e_bits[block] |= (Bits<T>)(stepped.delta != 0);
            if constexpr (Step::displaces) {
              store(z_new + r * stride + column, stepped.carried);
              z_bits[block] |= (Bits<T>)(stepped.carried != 0);
              if (outputs.carried != nullptr)
                store_part(outputs.carried + at[r].current + column, step.handed_down(at[r], column, count, stepped),
                           count);
              if (outputs.norms != nullptr) store(d_rows + r * stride + column, stepped.displacement);
            }
          }
        }
      }
    }
    if (j == sizes.time) break;
    if (Step::displaces && outputs.norms != nullptr)
      for (int64_t r = 0; r < tile.rows; ++r)
        outputs.norms[(tile.member * sizes.time + t) * sizes.batch + tile.row + r] = row_norm(d_rows + r * stride, H);
    for (int64_t block = 0; block < tile.blocks; ++block) {
      z_alive[block] = any<T>(z_bits[block]);
      e_alive[block] = any<T>(e_bits[block]);
    }
    T* swapped = z_old;
    z_old = z_new;
    z_new = swapped;
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
