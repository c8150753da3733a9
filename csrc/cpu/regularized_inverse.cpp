// regularized_inverse:  R = (W'W + reg I)^-1 W'      if N <= M
//                       R = W' (WW' + reg I)^-1      else
//
// Both are one computation: with B = W (or W'), of m = max(M, N) rows and k = min(M, N) columns, solve
// (B'B + reg I) X = B' for X [k, m], which is R (or R'): k^2 m, k^3 / 3 and twice k^2 m operations. blocked.h says how.
//
// A batch of small matrices is inverted in groups, one in each lane (interleaved.h), to the same bits; what is left
// over goes one by one. Deterministic: both say why.
#include "core/regularized_inverse.h"

#include "cpu/blocked.h"
#include "cpu/interleaved.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Inverts the first matrices of a batch in groups of one a lane, and returns how many.
template <class T>
int64_t invert_groups(const RegularizedInverse<T>& args, int max_threads) {
  const Interleaved<T> group(args.rows, args.columns, args.reg.any_zero());
  if (!group.suits_inverse()) return 0;
  const int64_t rest = args.batch % kLanes<T>, done = rest >= group.least() ? args.batch : args.batch - rest;
  if (done == 0) return 0;
  const int64_t size = args.rows * args.columns;
  const Buffer<int32_t> places(2 * size);
  int32_t *const of_weight = places.get(), *const of_inverse = of_weight + size;
  group.place(of_weight, of_inverse);
  for_groups<T>(done, group.operations(group.terms()), group.matrix_size() + group.factor_size(), max_threads,
                [&](int64_t first, int64_t count, Vec<T>* b) {
                  const T* const weight = args.weight + first * size;
                  int64_t* const status = args.status + first;
                  Vec<T>* const u = b + group.matrix_size();
                  group.load_matrices(weight, count, (args.batch - first) * size, of_weight, b);
                  Vec<T> reg;
                  for (int64_t l = 0; l < kLanes<T>; ++l) reg[l] = args.reg.of(first + (l < count ? l : count - 1));
                  group.factor(b, reg, weight, count, u, status);
                  group.invert(u, b);
                  group.store_lanes(b, size, size, count, status, of_inverse, args.inverse + first * size);
                });
  return done;
}

template <class T>
void invert(const RegularizedInverse<T>& args, int max_threads) {
  const int64_t size = args.rows * args.columns;
  if (size == 0) {
    for (int64_t i = 0; i < args.batch; ++i) args.status[i] = RegularizedInverse<T>::ok;
    return;
  }
  const int64_t done = invert_groups(args, max_threads);
  if (done == args.batch) return;
  const Blocked<T> matrix(args.rows, args.columns, args.reg.any_zero());
  const T* const weight = args.weight + done * size;
  T* const inverse = args.inverse + done * size;
  for_matrices<T>(args.batch - done, matrix.operations(), matrix.shared_size(), matrix.private_size(), max_threads,
                  args.status + done, [&](int64_t i, T* shared, T* own, bool alone) {
                    return matrix.invert(weight + i * size, args.reg.of(done + i), inverse + i * size, shared, own,
                                         alone);
                  });
}

}  // namespace

void regularized_inverse(const RegularizedInverse<float>& args, int threads) { invert(args, threads); }
void regularized_inverse(const RegularizedInverse<double>& args, int threads) { invert(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
