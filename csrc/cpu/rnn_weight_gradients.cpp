// rnn_weight_gradients:  [dW, db, dU] = scale * sum over steps and rows of delta_t' [h_{t-1}, 1, x_t]
//
// One product a member, of depth T * B, by chunks of its rows in the order of time and batch (weight_gradients.h). Each
// thread computes its own rows of the result (columns of delta), so nothing is shared and an element is the same sum,
// chunk by chunk in ascending order, on any number of threads; sums by chunks also keep float32's rounding error from
// growing with T. Beyond a row's length delta is zero, and states and inputs are left out, whatever stands there.
// Memory: a thread's share of the result, and kChunk packed rows of either side a thread.
#include "cpu/weight_gradients.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Rows [begin, end) of one member's result.
template <class T>
void weight_gradient_rows(const RnnWeightGradients<T>& args, int64_t member, int64_t begin, int64_t end,
                          const ChunkSpace<T>& space, T* sums) {
  const int64_t H = args.sizes.hidden, depth = args.sizes.time * args.sizes.batch;
  const WeightRows<T> rows(args, member, {0, 1, 0, args.sizes.batch});
  const int64_t width = rows.width();
  const int64_t sum_stride = rows.panels() * kLanes<T>;
  std::memset(sums, 0, static_cast<size_t>((end - begin) * sum_stride) * sizeof(T));
  for (int64_t first = 0; first < depth; first += kChunk) {
    const int64_t count = depth - first < kChunk ? depth - first : kChunk;
    const int64_t row = member * depth + first, next = row + kChunk;
    // The next chunk comes from memory while this one is computed: its states, and of delta as many bytes, which are
    // all of it where delta is one block.
    const uintptr_t states = address(args.states, next * H);
    const Upcoming upcoming{{address(args.delta, next * width), states, states}, kChunk * H * int64_t{sizeof(T)}};
    add_chunk(rows, args.delta + row * width, first, count, begin, end, upcoming, space, sums);
  }
  for (int64_t row = begin; row < end; ++row) rows.write(sums + (row - begin) * sum_stride, row);
}

template <class T>
void weight_gradients(const RnnWeightGradients<T>& args, int max_threads) {
  const RnnSizes& sizes = args.sizes;
  if (sizes.stack == 0) return;
  const WeightRows<T> rows(args, 0, {0, 1, 0, sizes.batch});
  const int64_t width = rows.width(), panels = rows.panels();
  const double operations =
      2.0 * static_cast<double>(sizes.stack * sizes.time * sizes.batch) * static_cast<double>(width * rows.columns());
  double most = operations / 1e6 + 1;
  if (most > static_cast<double>(width)) most = static_cast<double>(width);
  const int threads = most < 1 ? 1 : most < max_threads ? static_cast<int>(most) : max_threads;
  const int64_t most_rows = ceil_div(width, threads);
  const int64_t space_size = ceil_div(ChunkSpace<T>::size(most_rows, panels), 64) * 64;
  const int64_t share = space_size + ceil_div(most_rows * panels * kLanes<T>, 64) * 64;
  const Buffer<T> memory(threads * share, true);
#pragma omp parallel num_threads(threads)
  {
    const FlushSubnormals flush;
    const int64_t thread = thread_index(), count = thread_count();
    T* const own = memory.get() + thread * share;
    for (int64_t member = 0; member < sizes.stack; ++member) {
      // Shares of the planned number of threads, should fewer have come.
      for (int64_t part = thread; part < threads; part += count)
        if (part_begin(width, threads, part) < part_begin(width, threads, part + 1))
          weight_gradient_rows(args, member, part_begin(width, threads, part), part_begin(width, threads, part + 1),
                               ChunkSpace<T>(own, panels), own + space_size);
    }
  }
}

}  // namespace

void rnn_weight_gradients(const RnnWeightGradients<float>& args, int threads) { weight_gradients(args, threads); }
void rnn_weight_gradients(const RnnWeightGradients<double>& args, int threads) { weight_gradients(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
