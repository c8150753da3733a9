// regularized_inverse:  R = (W'W + reg I)^-1 W'      if N <= M
//                       R = W' (WW' + reg I)^-1      else
//
// With B = W (or W'), of m = max(M, N) rows and k = min(M, N) columns, both are one system A X = B' with A = B'B + reg
// I for X [k, m], which is R (or R'). It is solved by Gauss-Jordan elimination of [A B'], which needs no pivoting since
// A is positive definite; its pivots are the squares of the Cholesky factor's diagonal. Step j:
//     row_i -= a_ij (row_j / a_jj)   for all i != j
// These are k dependent steps, where a factorisation with two substitutions has 3 k, and k^2 m + k^3 / 3 multiply-adds,
// where that has k^2 m + k^3 / 6; both after k^2 m / 2 for A. For few matrices the steps are what costs. X is carried
// along rather than multiplied by an explicit A^-1, which would lose the square root of A's condition.
//
// m <= 32                  a group of lanes a matrix (small_inverse.h)
// k <= 128 and m <= 128    a block a matrix, or a part of one (large_inverse.h)
//
// Predicted on an H200 (132 multiprocessors, 1.8 GHz), float32, in microseconds, of which launch and first loads
// are 2.5:
//     n            8    16    32    64   100
//     batch 1      3     4   6.5    10    19
//     batch 64     3     4   6.5    10    23
//     batch 4096   4     7    28   150   510
// From 16 on, that is arithmetic and its instructions; traffic is 2 M N numbers a matrix, 70 us for the last entry.
//
// Deterministic: which block, part or width of block computes an element changes none of its operations, and nothing is
// summed across threads.
#include "cuda/kernels.h"
#include "cuda/large_inverse.h"
#include "cuda/small_inverse.h"

namespace tpext::cuda {
namespace {

template <class T, int N>
void launch_small(const RegularizedInverse<T>& args, const Queue& queue) {
  using Layout = Small<T, N>;
  const int64_t blocks = (args.batch + Layout::kMatrices - 1) / Layout::kMatrices;
  launch(invert_small<T, N>, Shape{blocks, kSmallThreads, Layout::kSharedBytes}, queue, args, args.reg.of(0));
}

// Blocks a matrix where a block has C groups of columns, the k columns of A among them.
TPEXT_HOST_DEVICE constexpr int parts_of(int groups, const Sizes& sizes) {
  const int width = groups * kWarp - sizes.order;
  return (sizes.terms + width - 1) / width;
}

template <class T, int G, int C, int W>
void launch_large(const RegularizedInverse<T>& args, const Sizes& sizes, const Queue& queue) {
  using Layout = Large<T, G, C, W>;
  const int parts = parts_of(C, sizes), width = (sizes.terms + parts - 1) / parts;
  const Shape shape{args.batch * parts, Layout::kThreads, Layout::kSharedBytes};
  launch(invert_large<T, G, C, W>, shape, queue, args, args.reg.of(0), parts, width);
}

}  // namespace

template <class T>
void regularized_inverse(const RegularizedInverse<T>& args, const Queue& queue) {
  const Sizes sizes(args.rows, args.columns);
  if (sizes.terms <= 8) return launch_small<T, 8>(args, queue);
  if (sizes.terms <= 16) return launch_small<T, 16>(args, queue);
  if (sizes.terms <= 32) return launch_small<T, 32>(args, queue);
  if (sizes.order <= 64) return launch_large<T, 2, 4, 4>(args, sizes, queue);
  // Narrow blocks eliminate A again for each part, wide ones leave multiprocessors idle where matrices are few: the
  // least number of rounds times what a round takes, by the head's count.
  const int64_t multiprocessors = limits(queue.device).multiprocessors;
  const auto cost = [&](int groups) {
    return (args.batch * parts_of(groups, sizes) + multiprocessors - 1) / multiprocessors * (17 + 3 * groups);
  };
  int best = 5;
  for (const int groups : {4, 7, 8}) {
    const bool there = groups == 4 ? sizes.order <= 112 : sizeof(T) == 4;
    if (there && cost(groups) < cost(best)) best = groups;
  }
  if (best == 4) return launch_large<T, 4, 4, 8>(args, sizes, queue);
  if constexpr (sizeof(T) == 4) {
    if (best == 7) return launch_large<T, 4, 7, 4>(args, sizes, queue);
    if (best == 8) return launch_large<T, 4, 8, 8>(args, sizes, queue);
  }
  launch_large<T, 4, 5, 8>(args, sizes, queue);
}

template void regularized_inverse<float>(const RegularizedInverse<float>&, const Queue&);
template void regularized_inverse<double>(const RegularizedInverse<double>&, const Queue&);

}  // namespace tpext::cuda
