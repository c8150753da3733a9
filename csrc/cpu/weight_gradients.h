// [dW, db, dU] = sum over rows of delta_k' [h_k, 1, x_k], a chunk of rows at a time: what the whole product
// (rnn_weight_gradients.cpp) and the one by tiles of time (layer_gradients.h) share.
//
// The right side is never built: the rows of a chunk are packed into panels (microkernel.h), multiplied with the
// columns of delta and added to an accumulator [D H, panels * L]. Blocks of delta that are of the state alone, or of
// the input alone, meet the first or the last of the panels only; the one is between h and x, so that it is among
// either. A chunk in which delta is zero, as far back as a displacement does not reach, is left out unless it has a NaN
// or an infinity.
#pragma once

#include "cpu/sweep.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Most rows of a chunk: the packed columns that a block of the result needs stay in the first-level cache.
constexpr int kChunk = 128;
// From panel to panel; not a multiple of 4096 bytes, or all panels would share the same cache sets.
template <class T>
constexpr int64_t kPanelStride = (kChunk + 4) * kLanes<T>;

// Where the rows of a sum stand: row k is batch row `row + k % width` at step `time + step * (k / width)`.
struct RowOrder {
  int64_t time, step, row, width;
};

// Rows of the packed matrix [h_{t-1}, 1, x_t] of one member, in a given order.
template <class T>
class WeightRows {
 public:
  // The sizes, states, h0, input and wanted gradients of `args` count.
  WeightRows(const RnnWeightGradients<T>& args, int64_t member, const RowOrder& order)
      : args_(args),
        order_(order),
        hidden_(args.grad_weight_hh == nullptr ? 0 : args.sizes.hidden),
        inputs_(args.grad_weight_ih == nullptr ? 0 : args.input.size),
        bias_(args.grad_bias == nullptr && args.grad_bias_hh == nullptr ? 0 : 1),
        member_(member),
        reverse_(args.sizes.reverse[member] != 0) {}

  int64_t columns() const { return hidden_ + inputs_ + bias_; }
  int64_t panels() const { return panel_count<T>(columns()); }
  // Those that a block of delta meets, from the first on and to before the second.
  int64_t begin_of(int block) const { return args_.blocks.of_state[block] < 0 ? hidden_ / kLanes<T> : 0; }
  int64_t end_of(int block) const {
    return args_.blocks.of_input[block] < 0 ? panel_count<T>(hidden_ + bias_) : panels();
  }
  int64_t hidden() const { return args_.sizes.hidden; }
  // Columns of delta.
  int64_t width() const { return args_.blocks.count * args_.sizes.hidden; }

  // Packs the rows `first` to `first + count`. `line` has room for what does not come from whole vectors of the state
  // and ends with zeros.
  void pack(int64_t first, int64_t count, T* line, T* packed) const {
    const int64_t whole = hidden_ / kLanes<T>, rest = hidden_ - whole * kLanes<T>, panel_stride = kPanelStride<T>;
    const int64_t others = panels() - whole;
    for_each_row(first, count, [&](int64_t k, bool valid, const T* before, const T* x) {
      T* to = packed + k * kLanes<T>;
      if (!valid) {
        for (int64_t p = 0; p < whole + others; ++p) store(to + p * panel_stride, Vec<T>{});
        return;
      }
      for (int64_t p = 0; p < whole; ++p) store(to + p * panel_stride, load(before + p * kLanes<T>));
      // What is left of the state, the one and the input lie side by side.
      for (int64_t i = 0; i < rest; ++i) line[i] = before[whole * kLanes<T> + i];
      if (bias_ != 0) line[rest] = T(1);
      for (int64_t i = 0; i < inputs_; ++i) line[rest + bias_ + i] = x[i];
      for (int64_t p = 0; p < others; ++p) store(to + (whole + p) * panel_stride, load(line + p * kLanes<T>));
    });
  }

  // Whether the rows have neither NaN nor infinity.
  bool finite(int64_t first, int64_t count) const {
    Bits<T> unusable = {};
    const auto look = [&](const T* row, int64_t size) {
      for (int64_t i = 0; i + kLanes<T> <= size; i += kLanes<T>) unusable |= not_finite<T>(load(row + i));
      for (int64_t i = size - size % kLanes<T>; i < size; i += kLanes<T>)
        unusable |= not_finite<T>(load_part(row + i, size - i));
    };
    for_each_row(first, count, [&](int64_t, bool valid, const T* before, const T* x) {
      if (!valid) return;
      look(before, hidden_);
      look(x, inputs_);
    });
    return !any_nonzero<T>(unusable);
  }

  // Writes a row of the result, of `columns` numbers.
  void write(const T* sum, int64_t row) const {
    const int64_t H = args_.sizes.hidden, block = row / H;
    const int of_state = args_.blocks.of_state[block], of_input = args_.blocks.of_input[block];
    const T scale = args_.scale.of(member_);
    if (of_state >= 0) {
      const int64_t at = (member_ * args_.blocks.gates + of_state) * H + row % H;
      if (hidden_ != 0) put(args_.grad_weight_hh + at * hidden_, sum, hidden_, scale);
      if (args_.grad_bias_hh != nullptr) put(args_.grad_bias_hh + at, sum + hidden_, 1, scale);
    }
    if (of_input >= 0) {
      const int64_t at = (member_ * args_.blocks.gates + of_input) * H + row % H;
      if (inputs_ != 0) put(args_.grad_weight_ih + at * inputs_, sum + hidden_ + bias_, inputs_, scale);
      if (args_.grad_bias != nullptr) put(args_.grad_bias + at, sum + hidden_, 1, scale);
    }
  }

 private:
  // Calls visit(k, valid, state before, input) for the rows first + k.
  template <class Visit>
  void for_each_row(int64_t first, int64_t count, const Visit& visit) const {
    const int64_t B = args_.sizes.batch, H = args_.sizes.hidden, T_ = args_.sizes.time;
    int64_t t = order_.time + order_.step * (first / order_.width), column = first % order_.width;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t b = order_.row + column, steps = valid_steps(args_.sizes, b);
      const bool starts = reverse_ ? t + 1 >= steps : t == 0;
      visit(k, t < steps,
            starts ? args_.h0 + (member_ * B + b) * H
                   : args_.states + ((member_ * T_ + t + (reverse_ ? 1 : -1)) * B + b) * H,
            args_.input.row(member_, t, b));
      if (++column == order_.width) column = 0, t += order_.step;
    }
  }

  static void put(T* to, const T* sum, int64_t count, T scale) {
    // Plus zero: a sum that underflowed is -0 or, had a chunk of zeros been added, +0.
    for (int64_t i = 0; i < count; ++i) to[i] = scale * sum[i] + T(0);
  }

  const RnnWeightGradients<T>& args_;
  const RowOrder order_;
  const int64_t hidden_, inputs_, bias_, member_;
  const bool reverse_;
};

template <class T>
inline bool all_zero(const T* delta, int64_t stride, int64_t count, int64_t columns) {
  for (int64_t k = 0; k < count; ++k, delta += stride) {
    Bits<T> joined = {};
    for (int64_t i = 0; i + kLanes<T> <= columns; i += kLanes<T>) joined |= (Bits<T>)load(delta + i);
    if (columns % kLanes<T> != 0)
      joined |= (Bits<T>)(columns < kLanes<T> ? load_part(delta, columns) : load(delta + columns - kLanes<T>));
    if (any_nonzero<T>(joined)) return false;
  }
  return true;
}

// Packs a block of columns of delta. Where they stand the rows lie H apart, and for an H that is a power of two they
// would fight for the same cache sets at every panel. `in_row` columns are left in a row from the first one on.
template <class T>
inline void pack_delta(const T* delta, int64_t stride, int64_t count, int64_t columns, int64_t in_row, T* packed) {
  if (in_row >= kMaxRows) {
    for (int64_t k = 0; k < count; ++k) std::memcpy(packed + k * kMaxRows, delta + k * stride, kMaxRows * sizeof(T));
  } else {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < columns; ++i) packed[k * kMaxRows + i] = delta[k * stride + i];
  }
}

// Two blocks side by side, the second `apart` columns from the first: a pass over the cache lines that they share.
template <class T>
inline void pack_delta_pair(const T* delta, int64_t apart, int64_t stride, int64_t count, T* packed) {
  T* const second = packed + kChunk * kMaxRows;
  for (int64_t k = 0; k < count; ++k) {
    std::memcpy(packed + k * kMaxRows, delta + k * stride, kMaxRows * sizeof(T));
    std::memcpy(second + k * kMaxRows, delta + k * stride + apart, kMaxRows * sizeof(T));
  }
}

// Memory of one thread for the rows [begin, end) of a result: packed chunks of either side.
template <class T>
class ChunkSpace {
 public:
  // Numbers for at most `most_rows` rows of the result, with `panels` panels; `line` must begin as zeros.
  static int64_t size(int64_t most_rows, int64_t panels) {
    return panels * kPanelStride<T> + ceil_div(most_rows, kMaxRows) * kChunk * kMaxRows + panels * kLanes<T>;
  }
  ChunkSpace(T* memory, int64_t panels)
      : line(memory), packed(memory + panels * kLanes<T>), packed_delta(packed + panels * kPanelStride<T>) {}

  T *line, *packed, *packed_delta;
};

// What is needed next, asked for while a chunk is multiplied.
struct Upcoming {
  uintptr_t from[3];
  int64_t bytes;
};

// Rows of the sums of one block of delta: [begin, end) of those of the chunk's share.
struct SumRows {
  int64_t begin, end, blocks, first_panel, panels, groups;

  template <class T>
  SumRows(const WeightRows<T>& rows, int block, int64_t from, int64_t to)
      : begin(block * rows.hidden() < from ? from : block * rows.hidden()),
        end((block + 1) * rows.hidden() < to ? (block + 1) * rows.hidden() : to),
        blocks(end > begin ? ceil_div(end - begin, kMaxRows) : 0),
        first_panel(rows.begin_of(block)),
        panels(rows.end_of(block) - first_panel),
        groups(blocks == 0 ? 0 : ceil_div(panels, max_panels(static_cast<int>(ceil_div(end - begin, blocks))))) {}

  int64_t row(int64_t block) const { return begin + part_begin(end - begin, blocks, block); }
  int64_t panel(int64_t group) const { return first_panel + part_begin(panels, groups, group); }
};

// Calls visit for the rows [begin, end) of the sums, by blocks of delta.
template <class T, class Visit>
inline void for_parts(const WeightRows<T>& rows, int64_t begin, int64_t end, const Visit& visit) {
  for (int block = 0; block * rows.hidden() < end; ++block) {
    const SumRows part(rows, block, begin, end);
    if (part.blocks * part.panels != 0) visit(part);
  }
}

// Adds delta' M of the rows `first` to `first + count` <= kChunk more to the rows [begin, end) of the sums
// [end - begin, panels * L]. `delta` is that of row `first`, the others follow.
template <class T>
__attribute__((noinline)) void add_chunk(const WeightRows<T>& rows, const T* delta, int64_t first, int64_t count,
                                         int64_t begin, int64_t end, const Upcoming& upcoming,
                                         const ChunkSpace<T>& space, T* sums) {
  const int64_t width = rows.width(), panel_stride = kPanelStride<T>, sum_stride = rows.panels() * kLanes<T>;
  if (all_zero(delta + begin, width, count, end - begin) && rows.finite(first, count)) return;
  rows.pack(first, count, space.line, space.packed);
  int64_t products = 0;
  for_parts(rows, begin, end, [&](const SumRows& part) { products += part.groups * part.blocks; });
  const int64_t share = products == 0 ? 0 : ceil_div(upcoming.bytes, products);
  uintptr_t at = 0;
  for_parts(rows, begin, end, [&](const SumRows& part) {
    for (int64_t block = 0; block < part.blocks;) {
      const int64_t column = part.row(block), next = part.row(block + 1);
      T* const to = space.packed_delta + block * kChunk * kMaxRows;
      if (block + 1 < part.blocks && width - next >= kMaxRows) {
        pack_delta_pair(delta + column, next - column, width, count, to);
        block += 2;
      } else {
        pack_delta(delta + column, width, count, next - column, width - column, to);
        block += 1;
      }
    }
    for (int64_t group = 0; group < part.groups; ++group) {
      const int64_t panel = part.panel(group);
      const int wide = static_cast<int>(part.panel(group + 1) - panel);
      for (int64_t block = 0; block < part.blocks; ++block) {
        const int64_t row = part.row(block);
        const int high = static_cast<int>(part.row(block + 1) - row);
        const Ahead ahead{{upcoming.from[0] + at, upcoming.from[1] + at, upcoming.from[2] + at},
                          ceil_div(share, kChunk * kMaxRows)};
        at += static_cast<uintptr_t>(share);
        const T* const columns = space.packed_delta + block * kChunk * kMaxRows;
        const Piece<T> piece{count, &columns};
        // The sums have left the first-level cache since the chunk before.
        for (int r = 0; r < high; ++r)
          for (int p = 0; p < wide; ++p)
            prefetch(address(sums, (row + r - begin) * sum_stride + (panel + p) * kLanes<T>));
        Vec<T> c[kMaxRows * kMaxPanels];
        find_product<T, true, kMaxRows>(high, wide)(&piece, 1, space.packed + panel * panel_stride, panel_stride, ahead,
                                                    c);
        for (int r = 0; r < high; ++r)
          for (int p = 0; p < wide; ++p) {
            T* to = sums + (row + r - begin) * sum_stride + (panel + p) * kLanes<T>;
            store(to, load(to) + c[r * kMaxPanels + p]);
          }
      }
    }
  });
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
