// counter_normal: out[b, n] = scale * standard normal number n of row first_row + b (core/counter_normal.h)
//
// A thread makes one group of four numbers of a row, and writes them at once where rows are whole groups. A number is a
// function of its place in the sequence alone: no order and no split of a batch changes a bit. No memory but the
// output.
#include "cuda/kernels.h"
#include "cuda/philox.h"

namespace tpext::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct alignas(16) Group {
  T values[4];
};

template <class T>
__global__ void __launch_bounds__(kThreads) fill(const __grid_constant__ CounterNormal<T> args, int64_t groups) {
  const int64_t at = int64_t{block_index()} * kThreads + thread_index();
  if (at >= args.rows * groups) return;
  const int64_t row = at / groups, group = at - row * groups;
  T z[4];
  normals(args.counter, args.counter.stream, row, group, z);
  T* const to = args.output + row * args.columns + 4 * group;
  if (args.columns % 4 == 0 && reinterpret_cast<uintptr_t>(args.output) % 16 == 0) {
    *reinterpret_cast<Group<T>*>(to) = {{z[0] * args.scale, z[1] * args.scale, z[2] * args.scale, z[3] * args.scale}};
  } else {
    for (int i = 0; i < 4; ++i)
      if (4 * group + i < args.columns) to[i] = z[i] * args.scale;
  }
}

}  // namespace

template <class T>
void counter_normal(const CounterNormal<T>& args, const Queue& queue) {
  const int64_t groups = (args.columns + 3) / 4;
  launch(fill<T>, Shape{(args.rows * groups + kThreads - 1) / kThreads, kThreads}, queue, args, groups);
}

template void counter_normal<float>(const CounterNormal<float>&, const Queue&);
template void counter_normal<double>(const CounterNormal<double>&, const Queue&);

}  // namespace tpext::cuda
