// counter_normal: out[b, n] = scale * standard normal number n of row first_row + b (core/counter_normal.h)
//
// Threads take contiguous parts of the blocks of kLanes groups that rows consist of; the last block of a row is stored
// in part. A number is a function of its place in the sequence alone, so threads and the split of a batch change no
// bit. No memory but the output, which is written once.
#include "core/counter_normal.h"

#include "cpu/microkernel.h"
#include "cpu/philox.h"
#include "cpu/threads.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Fewer numbers than this are not worth a second thread.
constexpr int64_t kGrain = 8192;

template <class T>
void fill(const CounterNormal<T>& args, int max_threads) {
  constexpr int64_t L = kLanes<T>;
  const int64_t row_blocks = ceil_div(args.columns, 4 * L), blocks = args.rows * row_blocks;
  const int64_t most = args.rows * args.columns / kGrain + 1;
  const int threads = most < max_threads ? static_cast<int>(most) : max_threads;
  const PhiloxKeys keys(args.counter.seed);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = thread_index(), team = thread_count();
    const int64_t end = part_begin(blocks, team, thread + 1);
    for (int64_t at = part_begin(blocks, team, thread); at < end;) {
      const int64_t row = at / row_blocks, first = at - row * row_blocks;
      const int64_t last = row_blocks - first < end - at ? row_blocks : first + end - at;
      for (int64_t block = first; block < last; ++block) {
        Vec<T> z[4];
        normals<T>(keys, args.counter.step, args.counter.stream, args.counter.first_row + static_cast<uint32_t>(row),
                   block * L, z);
        const int64_t column = block * 4 * L;
        T* const to = args.output + row * args.columns + column;
        for (int i = 0; i < 4; ++i)
          if (column + i * L < args.columns) store_part(to + i * L, z[i] * args.scale, args.columns - column - i * L);
      }
      at += last - first;
    }
  }
}

}  // namespace

void counter_normal(const CounterNormal<float>& args, int threads) { fill(args, threads); }
void counter_normal(const CounterNormal<double>& args, int threads) { fill(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
