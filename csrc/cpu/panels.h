// Matrices in panels one vector wide (L lanes), panel p holding the columns p*L .. p*L + L - 1 of all rows one after
// another, and the block that all work on them is made of: kRows rows times up to kGroup panels accumulate in registers
//     c[r][p] = sum_k a(r, k) * x[k][p]
// where a(r, k) is read from panels as well: products, and the steps of a Cholesky factorisation and its substitutions.
#pragma once

#include "cpu/interleaved.h"
#include "cpu/microkernel.h"
#include "cpu/threads.h"
#include "cpu/transpose.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// kRows x 3 accumulators. A block of rows never leaves its panel.
constexpr int kGroup = 3;

// A matrix in panels.
template <class T>
struct Panels {
  T* data;
  int64_t rows;

  int64_t stride() const { return rows * kLanes<T>; }
  T* at(int64_t panel, int64_t row) const { return data + panel * stride() + row * kLanes<T>; }
  // Element (row, column).
  T* element(int64_t row, int64_t column) const { return at(column / kLanes<T>, row) + column % kLanes<T>; }
};

// Panels [first, end) in groups of at most kGroup, their number a multiple of `parts` as far as panels go.
struct Groups {
  int64_t first, panels, count;

  Groups(int64_t first_panel, int64_t end, int64_t parts) : first(first_panel), panels(end - first_panel) {
    count = ceil_div(ceil_div(panels, kGroup), parts) * parts;
    count = count < panels ? count : panels;
  }
  int64_t begin(int64_t group) const { return first + part_begin(panels, count, group); }
};

// task.operator()<Count>() for count = 1 .. kGroup.
template <class Task>
inline void with_count(int64_t count, const Task& task) {
  static_assert(kGroup == 3);
  switch (count) {
    case 1: return task.template operator()<1>();
    case 2: return task.template operator()<2>();
    default: return task.template operator()<3>();
  }
}

// Runs task(0) .. task(count - 1), shared among the threads of the team unless the thread works alone; all are done
// when it returns.
template <class Task>
inline void share(bool alone, int64_t count, const Task& task) {
  if (alone) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) task(i);
}

template <class T, int Count>
using Block = Vec<T>[kRows<T>][Count];

// block[r][p] += sum_k a[r * RowStep + k * DepthStep] * x[k][p] over `depth` terms.
template <int RowStep, int DepthStep, class T, int Count>
[[gnu::always_inline]] inline void accumulate(int64_t depth, const T* a, const T* x, int64_t stride,
                                              Vec<T> (&block)[kRows<T>][Count]) {
  for (int64_t k = 0; k < depth; ++k, a += DepthStep, x += kLanes<T>) {
    Vec<T> row[Count];
#pragma GCC unroll 8
    for (int p = 0; p < Count; ++p) row[p] = *reinterpret_cast<const Vec<T>*>(x + p * stride);
#pragma GCC unroll 8
    for (int r = 0; r < kRows<T>; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < Count; ++p) block[r][p] += row[p] * a[r * RowStep];
  }
}

// Visits every vector of a block at x.
template <int Count, class T, class Visit>
[[gnu::always_inline]] inline void for_block(T* x, int64_t stride, const Visit& visit) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows<T>; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < Count; ++p) visit(r, p, *reinterpret_cast<Vec<T>*>(x + r * kLanes<T> + p * stride));
}

// The same without transposing: L columns of from [depth, ...], of which the first `columns` are there, and back.
template <class T>
void pack_straight(const T* from, int64_t stride, int64_t columns, int64_t depth, T* panel) {
  for (int64_t k = 0; k < depth; ++k) store(panel + k * kLanes<T>, load_part(from + k * stride, columns));
}

template <class T>
void unpack_straight(const T* panel, int64_t columns, int64_t depth, T* to, int64_t stride) {
  for (int64_t k = 0; k < depth; ++k) store_part(to + k * stride, load(panel + k * kLanes<T>), columns);
}

// Rows row .. row + R - 1 of x, in the panels [first, first + Count), minus what the rows [from, to) of U subtract
// from them: x[row + r] -= sum_k U[k][row + r] x[k]; then, if `substitute`, the block's own U' is solved for.
template <int Count, class T>
inline void forward(Panels<T> u, const T* reciprocal, Panels<T> x, int64_t first, int64_t row, int64_t from, int64_t to,
                    bool substitute) {
  constexpr int64_t L = kLanes<T>, R = kRows<T>;
  Block<T, Count> c = {};
  accumulate<1, L>(to - from, u.element(from, row), x.at(first, from), x.stride(), c);
  T* const block = x.at(first, row);
  for_block<Count>(block, x.stride(), [&](int r, int p, Vec<T>& v) { c[r][p] = v - c[r][p]; });
  if (substitute) {
    const T* const diagonal = u.element(row, row);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int p = 0; p < Count; ++p) c[r][p] *= reciprocal[row + r];
#pragma GCC unroll 8
      for (int s = r + 1; s < R; ++s)
#pragma GCC unroll 8
        for (int p = 0; p < Count; ++p) c[s][p] -= c[r][p] * diagonal[r * L + s];
    }
  }
  for_block<Count>(block, x.stride(), [&](int r, int p, Vec<T>& v) { v = c[r][p]; });
}

// The same from below: x[row + r] -= sum_k U[row + r][k] x[k].
template <int Count, class T>
inline void backward(Panels<T> u, const T* reciprocal, Panels<T> x, int64_t row, int64_t from, int64_t to,
                     bool substitute) {
  constexpr int64_t L = kLanes<T>, R = kRows<T>;
  Block<T, Count> c = {};
  for (int64_t k = from; k < to;) {
    const int64_t next = (k / L + 1) * L < to ? (k / L + 1) * L : to;
    accumulate<L, 1>(next - k, u.element(row, k), x.at(0, k), x.stride(), c);
    k = next;
  }
  T* const block = x.at(0, row);
  for_block<Count>(block, x.stride(), [&](int r, int p, Vec<T>& v) { c[r][p] = v - c[r][p]; });
  if (substitute) {
    const T* const diagonal = u.element(row, row);
#pragma GCC unroll 8
    for (int r = R - 1; r >= 0; --r) {
#pragma GCC unroll 8
      for (int p = 0; p < Count; ++p) c[r][p] *= reciprocal[row + r];
#pragma GCC unroll 8
      for (int s = 0; s < r; ++s)
#pragma GCC unroll 8
        for (int p = 0; p < Count; ++p) c[s][p] -= c[r][p] * diagonal[s * L + r];
    }
  }
  for_block<Count>(block, x.stride(), [&](int r, int p, Vec<T>& v) { v = c[r][p]; });
}

// Rows row .. row + R - 1 of U within their own panel; the rows [from, row) above are not yet subtracted. The square
// on the diagonal is factored in scalars: it is a chain of roots and divisions. The rest of the panel then follows by
// substitution, which rounds the square differently: it is written once for that to read and again over what it made.
template <class T>
inline void pivots(Panels<T> u, T* reciprocal, T* squared, int64_t row, int64_t from) {
  constexpr int64_t L = kLanes<T>, R = kRows<T>;
  forward<1>(u, reciprocal, u, row / L, row, from, row, false);
  T* const diagonal = u.element(row, row);
  T d[R][R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int s = r; s < R; ++s) d[r][s] = diagonal[r * L + s];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    squared[row + r] = d[r][r];
    d[r][r] = sizeof(T) == 4 ? __builtin_sqrtf(d[r][r]) : __builtin_sqrt(d[r][r]);
    reciprocal[row + r] = T(1) / d[r][r];
#pragma GCC unroll 8
    for (int s = r + 1; s < R; ++s) d[r][s] *= reciprocal[row + r];
#pragma GCC unroll 8
    for (int s = r + 1; s < R; ++s)
#pragma GCC unroll 8
      for (int t = s; t < R; ++t) d[s][t] -= d[r][s] * d[r][t];
  }
  const auto write = [&] {
    for (int r = 0; r < R; ++r)
      for (int s = r; s < R; ++s) diagonal[r * L + s] = d[r][s];
  };
  write();
  forward<1>(u, reciprocal, u, row / L, row, row, row, true);
  write();
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
