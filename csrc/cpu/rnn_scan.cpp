// rnn_scan:           h_t = a(x_proj_t + h_{t-1} W')
// rnn_scan_backward:  e_t = (g_t + e_{t+1} W) * a'(h_t),  grad_h0 = e_1 W
//
// Layouts stand in core/rnn.h, the split of the work in sweep.h. Both are one sweep over time per row tile; a step is
// one product of the tile's rows with the packed weights (2 H^2 operations a row) whose epilogue reads x_proj (or g and
// h) once and writes the state (or e) once. Memory: the packed weights, S * H * ceil(H) numbers. Deterministic: an
// element is one sum over k in ascending order, on whichever thread.
#include "cpu/activations.h"
#include "cpu/backward_sweep.h"
#include "cpu/sweep.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

template <class T, Nonlinearity A>
void scan_tile(const RnnScan<T>& args, const PackedStack<T>& weight, const Tile& tile) {
  const RnnSizes& sizes = args.sizes;
  const int64_t H = sizes.hidden;
  const bool reverse = sizes.reverse[tile.member] != 0;
  const PanelGroups groups(panel_count<T>(H), ceil_div(tile.rows, tile.blocks));
  int64_t steps[kTileRows];
  const T* h0[kTileRows];
  int64_t longest = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    steps[r] = valid_steps(sizes, tile.row + r);
    longest = steps[r] > longest ? steps[r] : longest;
    h0[r] = args.h0 + (tile.member * sizes.batch + tile.row + r) * H;
  }
  for (int64_t j = 0; j < sizes.time; ++j) {
    const int64_t t = reverse ? sizes.time - 1 - j : j;
    const int64_t current = ((tile.member * sizes.time + t) * sizes.batch + tile.row) * H;
    if (t >= longest) {
      std::memset(args.states + current, 0, static_cast<size_t>(tile.rows * H) * sizeof(T));
      continue;
    }
    const T* before = args.states + current + (reverse ? 1 : -1) * sizes.batch * H;
    const T* previous[kTileRows];
    for (int64_t r = 0; r < tile.rows; ++r) {
      const bool first = reverse ? t + 1 >= steps[r] : t == 0;
      previous[r] = first ? h0[r] : before + r * H;
    }
    for (int64_t group = 0; group < groups.groups; ++group) {
      const int64_t panel = groups.begin(group);
      const int panels = static_cast<int>(groups.begin(group + 1) - panel);
      for (int64_t block = 0; block < tile.blocks; ++block) {
        const int64_t row = tile.block_begin(block);
        const int rows = static_cast<int>(tile.block_begin(block + 1) - row);
        Vec<T> sums[kMaxRows * kMaxPanels];
        find_product<T>(rows, panels)(H, previous + row, weight.panel(tile.member, panel), weight.panel_stride(), sums);
        for (int r = 0; r < rows; ++r) {
          const int64_t offset = current + (row + r) * H;
          const bool valid = t < steps[row + r];
          for (int p = 0; p < panels; ++p) {
            const int64_t column = (panel + p) * kLanes<T>;
            const Vec<T> u = sums[r * kMaxPanels + p] + load_part(args.x_proj + offset + column, H - column);
            store_part(args.states + offset + column, valid ? activate<A, T>(u) : Vec<T>{}, H - column);
          }
        }
      }
    }
  }
}

template <class T>
void scan(const RnnScan<T>& args, int max_threads) {
  const int threads = useful_threads(args.sizes, 1, max_threads);
  PackedStack<T> weight(args.weight_hh, true, args.sizes);
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    weight.pack();
    for_each_tile(args.sizes, thread_index(), thread_count(), [&](const Tile& tile) {
      switch (args.nonlinearity) {
        case Nonlinearity::tanh: return scan_tile<T, Nonlinearity::tanh>(args, weight, tile);
        case Nonlinearity::relu: return scan_tile<T, Nonlinearity::relu>(args, weight, tile);
        case Nonlinearity::identity: return scan_tile<T, Nonlinearity::identity>(args, weight, tile);
      }
    });
  }
}

template <class T, Nonlinearity A>
struct GradientStep {
  static constexpr bool displaces = false;
  const RnnScanBackward<T>& args;

  Stepped<T> operator()(const RowStep& at, int64_t column, int64_t count, Vec<T>, Vec<T> credit) const {
    const Vec<T> h = load_part(args.states + at.current + column, count);
    const Vec<T> m = load_part(args.grad_states + at.current + column, count) + credit;
    return {times_derivative<A, T>(m, h), Vec<T>{}, Vec<T>{}};
  }
  Vec<T> initial(const RowStep&, int64_t, int64_t, Vec<T>, Vec<T> credit) const { return credit; }
};

template <class T>
void scan_backward(const RnnScanBackward<T>& args, int max_threads) {
  const int threads = useful_threads(args.sizes, 1, max_threads);
  PackedStack<T> inverse(nullptr, false, args.sizes), weight(args.weight_hh, false, args.sizes);
  const BackwardOutputs<T> outputs{args.grad_x_proj, args.grad_h0, nullptr, nullptr};
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    weight.pack();
    for_each_tile(args.sizes, thread_index(), thread_count(), [&](const Tile& tile) {
      switch (args.nonlinearity) {
        case Nonlinearity::tanh:
          return backward_tile(args.sizes, tile, inverse, weight, GradientStep<T, Nonlinearity::tanh>{args}, outputs,
                               static_cast<T*>(nullptr));
        case Nonlinearity::relu:
          return backward_tile(args.sizes, tile, inverse, weight, GradientStep<T, Nonlinearity::relu>{args}, outputs,
                               static_cast<T*>(nullptr));
        case Nonlinearity::identity:
          return backward_tile(args.sizes, tile, inverse, weight, GradientStep<T, Nonlinearity::identity>{args},
                               outputs, static_cast<T*>(nullptr));
      }
    });
  }
}

}  // namespace

void rnn_scan(const RnnScan<float>& args, int threads) { scan(args, threads); }
void rnn_scan(const RnnScan<double>& args, int threads) { scan(args, threads); }
void rnn_scan_backward(const RnnScanBackward<float>& args, int threads) { scan_backward(args, threads); }
void rnn_scan_backward(const RnnScanBackward<double>& args, int threads) { scan_backward(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
