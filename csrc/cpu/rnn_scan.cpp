// rnn_scan:  h_t = a(x_proj_t + h_{t-1} W')   or   h_t = a(x_t U' + b + h_{t-1} W')
//
// Layouts stand in core/rnn.h, the split of the work in sweep.h. It is one sweep over time per row tile; a step is one
// product of the tile's rows with the packed weights (2 H^2 operations a row, 2 H I more with an input) whose epilogue
// reads x_proj once and writes the state once. Memory: the packed weights, S * ceil(H) * (H + I + 1) numbers.
// Deterministic: an element is one sum in ascending order, on whichever thread.
#include "cpu/activations.h"
#include "cpu/sweep.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

template <class T, Nonlinearity A>
void scan_tile(const RnnScan<T>& args, const PackedStack<T>& weight, Tile tile) {
  const RnnSizes& sizes = args.sizes;
  const int64_t H = sizes.hidden;
  const bool reverse = sizes.reverse[tile.member] != 0;
  PanelGroups<T> groups(H, tile);
  const T one = 1;
  int64_t steps[kTileRows];
  const T *h0[kTileRows], *previous[kTileRows], *inputs[kTileRows], *ones[kTileRows];
  int64_t longest = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    steps[r] = valid_steps(sizes, tile.row + r);
    longest = steps[r] > longest ? steps[r] : longest;
    h0[r] = args.h0 + (tile.member * sizes.batch + tile.row + r) * H;
    ones[r] = &one;
  }
  const bool project = args.x_proj == nullptr;
  const int64_t row_size = static_cast<int64_t>(sizeof(T)) * H;
  for (int64_t j = 0; j < sizes.time; ++j) {
    const int64_t t = reverse ? sizes.time - 1 - j : j;
    const int64_t current = ((tile.member * sizes.time + t) * sizes.batch + tile.row) * H;
    if (t >= longest) {
      if (tile.part == 0) std::memset(args.states + current, 0, static_cast<size_t>(tile.rows * row_size));
      continue;
    }
    const int64_t next = (reverse ? -1 : 1) * sizes.batch * H;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const bool first = reverse ? t + 1 >= steps[r] : t == 0;
      previous[r] = first ? h0[r] : args.states + (current - next + r * H);
      if (project) inputs[r] = args.input.row(tile.member, t, tile.row + r);
    }
    for (int64_t group = 0; group < groups.count(); ++group) {
      const int64_t panel = groups.begin(group);
      const int panels = static_cast<int>(groups.begin(group + 1) - panel);
      for (int64_t block = 0; block < tile.blocks; ++block) {
        const int64_t row = tile.block_begin(block);
        const int rows = static_cast<int>(tile.block_begin(block + 1) - row);
        Piece<T> pieces[3];
        int count = 0;
        if (project && args.input.size != 0) pieces[count++] = {args.input.size, inputs + row};
        if (project && args.bias != nullptr) pieces[count++] = {1, ones};
        pieces[count++] = {H, previous + row};
        Vec<T> sums[kMaxRows * kMaxPanels];
        find_product<T, false>(rows, panels)(pieces, count, weight.panel(tile.member, panel), weight.panel_stride(), {},
                                             sums);
        for (int r = 0; r < rows; ++r) {
          const int64_t offset = current + (row + r) * H;
          const bool valid = t < steps[row + r];
          for (int p = 0; p < panels; ++p) {
            const int64_t column = panel_column<T>(H, panel + p);
            Vec<T> u = sums[r * kMaxPanels + p];
            if (!project) {
              u += load_part(args.x_proj + offset + column, H - column);
              prefetch(address(args.x_proj, offset + column + next));
            }
            prefetch(address(args.states, offset + column + next));
            store_part(args.states + offset + column, valid ? activate<A, T>(u) : Vec<T>{}, H - column);
          }
        }
      }
    }
    if (!tile.meet()) {
      if (tile.part != 0) return;
      tile = tile.alone();
      groups = PanelGroups<T>(H, tile);
    }
  }
  if (args.h_n == nullptr || tile.part != 0) return;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t last = reverse ? 0 : steps[r] - 1, row = tile.row + r;
    const T* from = steps[r] == 0 ? h0[r] : args.states + ((tile.member * sizes.time + last) * sizes.batch + row) * H;
    std::memcpy(args.h_n + (tile.member * sizes.batch + row) * H, from, static_cast<size_t>(row_size));
  }
}

template <class T>
void scan(const RnnScan<T>& args, int max_threads) {
  const int processors = team_processors(args.sizes.stack * args.sizes.batch, max_threads);
  const int threads = useful_threads<T>(args.sizes, 1, max_threads, processors);
  const bool project = args.x_proj == nullptr;
  PackedStack<T> weight(args.weight_hh, true, args.sizes, project ? args.weight_ih : nullptr, args.input.size,
                        project ? args.bias : nullptr);
  const Buffer<Barrier> barriers(threads, true);
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    weight.pack();
    for_each_tile<T>(args.sizes, 1, processors, barriers.get(), [&](const Tile& tile, int64_t) {
      switch (args.nonlinearity) {
        case Nonlinearity::tanh: return scan_tile<T, Nonlinearity::tanh>(args, weight, tile);
        case Nonlinearity::relu: return scan_tile<T, Nonlinearity::relu>(args, weight, tile);
        case Nonlinearity::identity: return scan_tile<T, Nonlinearity::identity>(args, weight, tile);
      }
    });
  }
}

}  // namespace

void rnn_scan(const RnnScan<float>& args, int threads) { scan(args, threads); }
void rnn_scan(const RnnScan<double>& args, int threads) { scan(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
