// rnn_weight_gradients:  [dW, dU, db] = scale * sum over steps and rows of delta_t' [h_{t-1}, x_t, 1]
//
// One product a member, of depth T * B, whose right side is never built: a chunk of its rows at a time is packed into
// panels (layouts in core/rnn.h and microkernel.h), multiplied with the columns of delta, and added to an accumulator.
// Each thread computes its own rows of the result (columns of delta), so nothing is shared and an element is the same
// sum, chunk by chunk in ascending order, on any number of threads; sums by chunks also keep float32's rounding error
// from growing with T. Beyond a row's length delta is zero, and states and inputs are left out, whatever stands there.
// A chunk in which delta is zero, as far back as a displacement does not reach, is left out unless it has a NaN or an
// infinity. Memory: a thread's share of the result, and kChunk packed rows of either side a thread.
#include "cpu/sweep.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Rows of a chunk: the packed columns that a block of the result needs stay in the first-level cache.
constexpr int kChunk = 128;
// From panel to panel; not a multiple of 4096 bytes, or all panels would share the same cache sets.
template <class T>
constexpr int64_t kPanelStride = (kChunk + 4) * kLanes<T>;

// Rows of the packed matrix [h_{t-1}, x_t, 1] of one member, in the order of time and batch.
template <class T>
class Rows {
 public:
  Rows(const RnnWeightGradients<T>& args, int64_t member)
      : args_(args),
        hidden_(args.grad_weight_hh == nullptr ? 0 : args.sizes.hidden),
        inputs_(args.grad_weight_ih == nullptr ? 0 : args.input.size),
        bias_(args.grad_bias == nullptr ? 0 : 1),
        member_(member),
        reverse_(args.sizes.reverse[member] != 0) {}

  int64_t columns() const { return hidden_ + inputs_ + bias_; }
  int64_t panels() const { return panel_count<T>(columns()); }

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
      // What is left of the state, the input and the one lie side by side.
      for (int64_t i = 0; i < rest; ++i) line[i] = before[whole * kLanes<T> + i];
      for (int64_t i = 0; i < inputs_; ++i) line[rest + i] = x[i];
      if (bias_ != 0) line[rest + inputs_] = T(1);
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
    const int64_t at = member_ * args_.sizes.hidden + row;
    if (hidden_ != 0) put(args_.grad_weight_hh + at * hidden_, sum, hidden_);
    if (inputs_ != 0) put(args_.grad_weight_ih + at * inputs_, sum + hidden_, inputs_);
    if (bias_ != 0) put(args_.grad_bias + at, sum + hidden_ + inputs_, 1);
  }

 private:
  // Calls visit(k, valid, state before, input) for the rows first + k.
  template <class Visit>
  void for_each_row(int64_t first, int64_t count, const Visit& visit) const {
    const int64_t B = args_.sizes.batch, H = args_.sizes.hidden, T_ = args_.sizes.time;
    int64_t t = first / B, b = first % B;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t steps = valid_steps(args_.sizes, b);
      const bool starts = reverse_ ? t + 1 >= steps : t == 0;
      visit(k, t < steps,
            starts ? args_.h0 + (member_ * B + b) * H
                   : args_.states + ((member_ * T_ + t + (reverse_ ? 1 : -1)) * B + b) * H,
            args_.input.row(t, b));
      if (++b == B) b = 0, ++t;
    }
  }

  void put(T* to, const T* sum, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = args_.scale * sum[i];
  }

  const RnnWeightGradients<T>& args_;
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

// Rows [begin, end) of one member's result.
template <class T>
void weight_gradient_rows(const RnnWeightGradients<T>& args, int64_t member, int64_t begin, int64_t end, T* packed,
                          T* packed_delta, T* sums, T* line) {
  const int64_t H = args.sizes.hidden, depth = args.sizes.time * args.sizes.batch;
  const Rows<T> rows(args, member);
  const int64_t panels = rows.panels(), panel_stride = kPanelStride<T>, sum_stride = panels * kLanes<T>;
  const int64_t blocks = ceil_div(end - begin, kMaxRows);
  const int64_t groups = ceil_div(panels, max_panels(static_cast<int>(ceil_div(end - begin, blocks))));
  std::memset(sums, 0, static_cast<size_t>((end - begin) * sum_stride) * sizeof(T));
  for (int64_t first = 0; first < depth; first += kChunk) {
    const int64_t count = depth - first < kChunk ? depth - first : kChunk;
    const T* delta = args.delta + (member * depth + first) * H + begin;
    if (all_zero(delta, H, count, end - begin) && rows.finite(first, count)) continue;
    rows.pack(first, count, line, packed);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = part_begin(end - begin, blocks, block), next = part_begin(end - begin, blocks, block + 1);
      pack_delta(delta + row, H, count, next - row, H - begin - row, packed_delta + block * kChunk * kMaxRows);
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t panel = part_begin(panels, groups, group);
      const int wide = static_cast<int>(part_begin(panels, groups, group + 1) - panel);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = part_begin(end - begin, blocks, block);
        const int high = static_cast<int>(part_begin(end - begin, blocks, block + 1) - row);
        // The next chunk comes from memory while this one is computed.
        const int64_t share = ceil_div(kChunk * H, groups * blocks), row_size = (member * depth + first + kChunk) * H;
        const int64_t at = row_size + (group * blocks + block) * share;
        const Ahead ahead{{address(args.delta, at), address(args.states, at), address(args.states, at)},
                          ceil_div(share * int64_t{sizeof(T)}, kChunk * kMaxRows)};
        const T* const columns = packed_delta + block * kChunk * kMaxRows;
        const Piece<T> piece{count, &columns};
        Vec<T> c[kMaxRows * kMaxPanels];
        find_product<T, true, kMaxRows>(high, wide)(&piece, 1, packed + panel * panel_stride, panel_stride, ahead, c);
        for (int r = 0; r < high; ++r)
          for (int p = 0; p < wide; ++p) {
            T* to = sums + (row + r) * sum_stride + (panel + p) * kLanes<T>;
            store(to, load(to) + c[r * kMaxPanels + p]);
          }
      }
    }
  }
  for (int64_t row = begin; row < end; ++row) rows.write(sums + (row - begin) * sum_stride, row);
}

template <class T>
void weight_gradients(const RnnWeightGradients<T>& args, int max_threads) {
  const RnnSizes& sizes = args.sizes;
  if (sizes.stack == 0) return;
  const Rows<T> rows(args, 0);
  const int64_t H = sizes.hidden, panels = rows.panels();
  const double operations =
      2.0 * static_cast<double>(sizes.stack * sizes.time * sizes.batch) * static_cast<double>(H * rows.columns());
  double most = operations / 1e6 + 1;
  if (most > static_cast<double>(H)) most = static_cast<double>(H);
  const int threads = most < 1 ? 1 : most < max_threads ? static_cast<int>(most) : max_threads;
  const int64_t most_rows = ceil_div(H, threads);
  const int64_t packed_size = panels * kPanelStride<T>, delta_size = ceil_div(most_rows, kMaxRows) * kChunk * kMaxRows;
  const int64_t sums_size = most_rows * panels * kLanes<T>, line_size = panels * kLanes<T>;
  const int64_t share = ceil_div(packed_size + delta_size + sums_size + line_size, 64) * 64;
  const Buffer<T> memory(threads * share, true);
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    const int64_t thread = thread_index(), count = thread_count();
    T* const packed = memory.get() + thread * share;
    for (int64_t member = 0; member < sizes.stack; ++member) {
      // Shares of the planned number of threads, should fewer have come.
      for (int64_t part = thread; part < threads; part += count)
        if (part_begin(H, threads, part) < part_begin(H, threads, part + 1))
          weight_gradient_rows(args, member, part_begin(H, threads, part), part_begin(H, threads, part + 1), packed,
                               packed + packed_size, packed + packed_size + delta_size,
                               packed + packed_size + delta_size + sums_size);
    }
  }
}

}  // namespace

void rnn_weight_gradients(const RnnWeightGradients<float>& args, int threads) { weight_gradients(args, threads); }
void rnn_weight_gradients(const RnnWeightGradients<double>& args, int threads) { weight_gradients(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
