// gated_scan: the forward pass of a GRU or an LSTM, from x_t to h_t (core/gates.h).
//
// Layouts stand in core/gated.h, the split of the work in sweep.h. It is one sweep over time per row tile. A panel is
// the same columns of all G gates side by side, so that one product of a block of rows has their sums in registers,
//     [x_t, 1, 1, h_{t-1}] [U'; b_ih; b_hh; W']
// of depth I + 2 + H (2 G H (H + I) operations a row), and its epilogue does the whole step. The GRU's candidate needs
// the two parts of its sum apart: there the product is in two parts, [x_t, 1] and [1, h_{t-1}], for all gates. An
// LSTM's c stands in a row tile of scratch memory, each panel at a place of its own. Memory: the packed weights, S * G
// * ceil(H) * (H + I + 2) numbers, and the tile a team. Deterministic: an element is one sum in ascending order (the
// GRU's, two), on whichever thread.
#include "core/gates.h"
#include "cpu/activations.h"
#include "cpu/sweep.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// [S] packed matrices [U'; b_ih; b_hh; W'] in panels of one gate, those of the same columns next to one another.
template <class T>
class PackedGates {
 public:
  PackedGates(const GatedScan<T>& args, int gates)
      : args_(args),
        gates_(gates),
        inputs_(args.input.size),
        biases_(args.bias_ih == nullptr ? 0 : 1),
        panels_(panel_count<T>(args.sizes.hidden)),
        packed_(args.sizes.stack * panels_ * gates * panel_stride()) {}

  // To be called by every thread of a parallel region.
  void pack() {
    const int64_t H = args_.sizes.hidden, items = args_.sizes.stack * panels_ * gates_;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; ++i) {
      const int64_t gate = i % gates_, panel = i / gates_ % panels_, member = i / gates_ / panels_;
      const int64_t row = (member * gates_ + gate) * H;
      T* packed = packed_.get() + i * panel_stride();
      const auto add = [&](const T* weight, int64_t row_stride, int64_t column_stride, int64_t depth) {
        pack_panel(weight, row_stride, column_stride, depth, H, panel, packed);
        packed += depth * kLanes<T>;
      };
      add(args_.weight_ih + row * inputs_, 1, inputs_, inputs_);
      if (biases_ != 0) add(args_.bias_ih + row, 0, 1, 1);
      if (biases_ != 0) add(args_.bias_hh + row, 0, 1, 1);
      add(args_.weight_hh + row * H, 1, H, H);
    }
  }

  int64_t biases() const { return biases_; }
  int64_t panel_stride() const { return (inputs_ + 2 * biases_ + args_.sizes.hidden) * kLanes<T>; }
  // The first gate's panel.
  const T* panel(int64_t member, int64_t index) const {
    return packed_.get() + (member * panels_ + index) * gates_ * panel_stride();
  }
  // From there to the part that meets the state before.
  int64_t of_state() const { return (inputs_ + biases_) * kLanes<T>; }

 private:
  const GatedScan<T>& args_;
  const int64_t gates_, inputs_, biases_, panels_;
  Buffer<T> packed_;
};

// The product of some rows with so many panels, and the most rows that registers are there for.
template <class T, int Panels, int Rows = 1>
Product<T> panel_product(int rows) {
  if constexpr (Rows < kMaxRows && max_panels(Rows + 1) >= Panels)
    if (rows > Rows) return panel_product<T, Panels, Rows + 1>(rows);
  return product<T, Rows, Panels, false, 1>;
}

constexpr int most_rows(int panels) {
  int rows = 1;
  while (rows < kMaxRows && max_panels(rows + 1) >= panels) ++rows;
  return rows;
}

// A row tile at a step.
template <class T>
struct TileStep {
  const T *before[kTileRows], *inputs[kTileRows];
  bool valid[kTileRows];
  int64_t current, next;  // the tile's first row in [S, T, B, H], and from there to the next step's
};

template <class T, class Cell>
class TileScan {
 public:
  // `cells` has a row tile, [rows, panels * L], for an LSTM.
  TileScan(const GatedScan<T>& args, const PackedGates<T>& weights, const Tile& tile, T* cells)
      : args_(args),
        weights_(weights),
        tile_(blocked(tile)),
        cells_(cells),
        reverse_(args.sizes.reverse[tile.member] != 0) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      steps_[r] = valid_steps(args.sizes, tile.row + r);
      longest_ = steps_[r] > longest_ ? steps_[r] : longest_;
      ones_[r] = kOnes;
    }
  }

  void run() {
    const RnnSizes& sizes = args_.sizes;
    if constexpr (Cell::kHasCell)
      for_own_panels([&](int64_t panel, int64_t column, int64_t count) {
        for (int64_t r = 0; r < tile_.rows; ++r)
          store(cell(r, panel), load_part(args_.c0 + initial(r) + column, count));
      });
    for (int64_t j = 0; j < sizes.time; ++j) {
      const int64_t t = reverse_ ? sizes.time - 1 - j : j;
      if (t >= longest_) {
        if (tile_.part == 0) clear(t);
        continue;
      }
      const TileStep<T> step = place(t);
      for_own_panels([&](int64_t panel, int64_t column, int64_t count) {
        for (int64_t block = 0; block < tile_.blocks; ++block) advance(step, block, panel, column, count);
      });
      if (!tile_.meet()) {
        if (tile_.part != 0) return;
        tile_ = blocked(tile_.alone());
      }
    }
    if constexpr (Cell::kHasCell)
      for_own_panels([&](int64_t panel, int64_t column, int64_t count) {
        for (int64_t r = 0; r < tile_.rows; ++r)
          store_part(args_.c_n + initial(r) + column, load(cell(r, panel)), count);
      });
    if (tile_.part != 0) return;
    for (int64_t r = 0; r < tile_.rows; ++r) {
      const int64_t last = reverse_ ? 0 : steps_[r] - 1;
      const T* const from = steps_[r] == 0 ? args_.h0 + initial(r) : args_.states + state(last) + r * sizes.hidden;
      std::memcpy(args_.h_n + initial(r), from, static_cast<size_t>(sizes.hidden) * sizeof(T));
    }
  }

 private:
  static constexpr int kGates = Cell::kGates, kKept = Cell::kKept, kRows = most_rows(kGates);
  static constexpr T kOnes[2] = {T(1), T(1)};

  static Tile blocked(Tile tile) {
    tile.blocks = ceil_div(tile.rows, kRows);
    return tile;
  }

  // Calls visit(panel, its first column, columns from there on) for the panels of this thread.
  template <class Visit>
  void for_own_panels(const Visit& visit) const {
    const int64_t H = args_.sizes.hidden;
    const PanelGroups<T> panels(H, tile_, 1);
    for (int64_t i = 0; i < panels.count(); ++i) {
      const int64_t column = panel_column<T>(H, panels.begin(i));
      visit(panels.begin(i), column, H - column);
    }
  }

  int64_t initial(int64_t r) const { return (tile_.member * args_.sizes.batch + tile_.row + r) * args_.sizes.hidden; }
  int64_t state(int64_t t) const {
    return ((tile_.member * args_.sizes.time + t) * args_.sizes.batch + tile_.row) * args_.sizes.hidden;
  }
  T* cell(int64_t r, int64_t panel) const {
    return cells_ + (r * panel_count<T>(args_.sizes.hidden) + panel) * kLanes<T>;
  }

  void clear(int64_t t) const {
    const size_t size = static_cast<size_t>(tile_.rows * args_.sizes.hidden) * sizeof(T);
    std::memset(args_.states + state(t), 0, size);
    if (args_.kept != nullptr) std::memset(args_.kept + state(t) * kKept, 0, size * kKept);
  }

  TileStep<T> place(int64_t t) const {
    TileStep<T> step;
    step.current = state(t);
    step.next = (reverse_ ? -1 : 1) * args_.sizes.batch * args_.sizes.hidden;
    for (int64_t r = 0; r < tile_.rows; ++r) {
      const bool first = reverse_ ? t + 1 >= steps_[r] : t == 0;
      step.before[r] =
          first ? args_.h0 + initial(r) : args_.states + (step.current - step.next + r * args_.sizes.hidden);
      step.inputs[r] = args_.input.row(tile_.member, t, tile_.row + r);
      step.valid[r] = t < steps_[r];
    }
    return step;
  }

  // A block of rows and a panel.
  void advance(const TileStep<T>& step, int64_t block, int64_t panel, int64_t column, int64_t count) const {
    const int64_t first = tile_.block_begin(block), H = args_.sizes.hidden;
    const int rows = static_cast<int>(tile_.block_begin(block + 1) - first);
    const T* const packed = weights_.panel(tile_.member, panel);
    const auto multiply = panel_product<T, kGates>(rows);
    const Piece<T> inputs{args_.input.size, step.inputs + first}, states{H, step.before + first};
    Vec<T> sums[kMaxRows * kMaxPanels], of_state[kMaxRows * kMaxPanels];
    if constexpr (Cell::kHasCell) {
      const Piece<T> pieces[] = {inputs, {2 * weights_.biases(), ones_}, states};
      multiply(pieces, 3, packed, weights_.panel_stride(), {}, sums);
    } else {
      const Piece<T> of_input[] = {inputs, {weights_.biases(), ones_}};
      const Piece<T> from_state[] = {{weights_.biases(), ones_}, states};
      multiply(of_input, 2, packed, weights_.panel_stride(), {}, sums);
      multiply(from_state, 2, packed + weights_.of_state(), weights_.panel_stride(), {}, of_state);
    }
    for (int64_t r = first; r < first + rows; ++r) {
      typename Cell::Kept made;
      const Vec<T>* const sum = sums + (r - first) * kMaxPanels;
      if constexpr (Cell::kHasCell) {
        made = Cell::step(sum, load(cell(r, panel)));
        if (step.valid[r]) store(cell(r, panel), made.values[kKept - 1]);
      } else {
        made = Cell::step(sum, of_state + (r - first) * kMaxPanels, load_part(step.before[r] + column, count));
      }
      if (!step.valid[r]) made = typename Cell::Kept{};
      T* const to = args_.states + step.current + r * H + column;
      prefetch(address(to, step.next));
      store_part(to, made.state, count);
      if (args_.kept == nullptr) continue;
      T* const kept = args_.kept + (step.current + r * H) * kKept + column;
      for (int i = 0; i < kKept; ++i) {
        prefetch(address(kept, step.next * kKept + i * H));
        store_part(kept + i * H, made.values[i], count);
      }
    }
  }

  const GatedScan<T>& args_;
  const PackedGates<T>& weights_;
  Tile tile_;
  T* const cells_;
  const bool reverse_;
  int64_t steps_[kTileRows], longest_ = 0;
  const T* ones_[kTileRows];
};

template <class T, class Cell>
void scan(const GatedScan<T>& args, int max_threads) {
  const RnnSizes& sizes = args.sizes;
  const int products = Cell::kGates;
  const int processors = team_processors(sizes.stack * sizes.batch, max_threads);
  const int threads = useful_threads<T>(sizes, products, max_threads, processors);
  PackedGates<T> weights(args, Cell::kGates);
  const Buffer<Barrier> barriers(threads, true);
  const int64_t cells_size = Cell::kHasCell ? kTileRows * panel_count<T>(sizes.hidden) * kLanes<T> : 0;
  const Buffer<T> cells(threads * cells_size);
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    weights.pack();
    for_each_tile<T>(sizes, products, processors, barriers.get(), [&](const Tile& tile, int64_t team) {
      TileScan<T, Cell>(args, weights, tile, cells.get() + team * cells_size).run();
    });
  }
}

template <class T>
void scan(const GatedScan<T>& args, int threads) {
  switch (args.cell) {
    case Cell::gru: return scan<T, Gru<VectorMath<T>>>(args, threads);
    case Cell::lstm: return scan<T, Lstm<VectorMath<T>>>(args, threads);
  }
}

}  // namespace

void gated_scan(const GatedScan<float>& args, int threads) { scan(args, threads); }
void gated_scan(const GatedScan<double>& args, int threads) { scan(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
