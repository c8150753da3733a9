// Many small matrices at a time: lane l of every vector belongs to matrix l of a group of L (L lanes).
//
// With B = W (or W' where M < N), of m = max(M, N) rows (terms) and k = min(M, N) columns (the order), a group is
// transposed into vectors, and Gram matrix, Cholesky factor and substitutions are computed as those of one matrix whose
// numbers are vectors: nothing is wasted on partial vectors or on moving numbers between lanes, however small k is.
// Everything heavy is one block again, kRows rows times kStrip columns accumulating in registers
//     c[r][p] += a(k, r) * x(k, p)
// which loads kRows + kStrip vectors for kRows * kStrip products. Memory, in vectors:
//     B and X   in strips of kStrip terms: element (order i, term t) at t / kStrip * stride + i * kStrip + t % kStrip
//     A and U   in panels of kRows columns: element (i, j) at j / kRows * (kRows * padded) + i * kRows + j % kRows
// Between two strips lies a block's worth of vectors, or blocks of different strips would share their places in the
// first-level cache.
//
// Every element takes the operations of the kernel for single matrices (blocked.h) in the same order: rows
// are eliminated in the same blocks of kRows, and sums run in the same direction. Both give the same bits, so that
// neither the batch, the place in it, nor the choice between the two changes a result of finite numbers.
//
// A lane whose matrix fails holds NaN or infinity from there on; no operation crosses lanes. Lanes without a matrix of
// their own repeat the group's last one.
#pragma once

#include "core/regularized_inverse.h"
#include "cpu/microkernel.h"
#include "cpu/threads.h"
#include "cpu/transpose.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Rows of a block: 8 x 3 accumulators of 32 registers, or 4 x 3 of 16.
template <class T>
constexpr int kRows = TPEXT_VECTOR_BYTES == 64 ? 8
                      : kLanes<T> < 4          ? kLanes<T>
                                               : 4;

// Depth of a slice: 3 panels of 128 vectors are half a first-level cache. Sums of more terms are added up by slices.
constexpr int64_t kDepth = 128;

// The status of a matrix whose factorisation failed: NaN or infinity stands on the Gram matrix's diagonal, so it shows
// in a pivot.
template <class T>
inline int64_t failure(const T* weight, int64_t size) {
  T check = 0;
  for (int64_t i = 0; i < size; ++i) check += weight[i] * T(0);
  return check == T(0) ? RegularizedInverse<T>::singular : RegularizedInverse<T>::not_finite;
}

template <class T>
class Interleaved {
 public:
  using V = Vec<T>;
  static constexpr int L = kLanes<T>, R = kRows<T>;
  // Columns of a block.
  static constexpr int C = 2;
  // What the order is padded to with an identity: the last rows make half a block where they fit.
  static constexpr int H = R < 2 * C ? R : R / 2;

  // `any_plain`: a matrix may come without a ridge.
  Interleaved(int64_t rows, int64_t columns, bool any_plain)
      : rows_(rows),
        columns_(columns),
        tall_(columns <= rows),
        order_(tall_ ? columns : rows),
        terms_(tall_ ? rows : columns),
        padded_(ceil_div(order_, H) * H),
        stride_((padded_ + R) * C),
        any_plain_(any_plain) {}

  // The sizes at which groups invert faster than the kernel for single matrices does, which needs whole vectors and
  // many panels to be fast. Sums of one slice only.
  bool suits_inverse() const { return order_ <= 48 && order_ <= 12 * L && terms_ <= kDepth; }
  // The fewest matrices that are inverted faster as a group than one by one (all of these as measured).
  int64_t least() const { return ceil_div(L * (order_ + 8), 64); }
  // The sizes that groups are solved for in.
  bool suits_solve() const { return order_ <= 64 && terms_ <= kDepth; }
  // Of the factorisation of a group and of `columns` substitutions, and what moving numbers takes.
  double operations(int64_t columns) const {
    const double k = static_cast<double>(padded_), m = static_cast<double>(terms_), n = static_cast<double>(columns);
    return L * (k * k * (m + k / 3 + 2 * n) + 4 * k * (m + n));
  }
  // The same for `count` solutions, in operations of a single matrix (blocked.h) that take as long (as measured): 8.5e3
  // a lane stand for the tables.
  double solve_operations(int64_t count) const {
    const double k = static_cast<double>(padded_), m = static_cast<double>(terms_), n = static_cast<double>(count);
    return 1.1 * L * (8.5e3 + k * k * (m + k / 3) + 2 * n * k * (m + k) + 4 * k * (m + n));
  }

  bool tall() const { return tall_; }
  int64_t order() const { return order_; }
  int64_t padded() const { return padded_; }
  int64_t terms() const { return terms_; }
  int64_t strips() const { return ceil_div(terms_, C); }
  int64_t stride() const { return stride_; }
  // Sizes in vectors.
  int64_t matrix_size() const { return strips() * stride_; }
  int64_t factor_size() const {
    return ceil_div(padded_, R) * R * padded_ + 2 * padded_ + (any_plain_ ? padded_ * C : 0);
  }

  // Where the elements of W [M, N] stand among the strips, and those of R [N, M] among the strips of X.
  void place(int32_t* of_weight, int32_t* of_inverse) const {
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < columns_; ++j) {
        const int64_t term = tall_ ? i : j, row = tall_ ? j : i;
        const auto at = static_cast<int32_t>(term / C * stride_ + row * C + term % C);
        of_weight[i * columns_ + j] = at;
        of_inverse[j * rows_ + i] = at;
      }
  }

  // The first `count` matrices at `weight` into the lanes of b; `readable` numbers may be read from `weight` on.
  void load_matrices(const T* weight, int64_t count, int64_t readable, const int32_t* place, V* b) const {
    load_lanes(weight, rows_ * columns_, rows_ * columns_, count, readable, place, b);
    for (int64_t strip = 0; strip < strips(); ++strip)
      for (int64_t i = order_ * C; i < padded_ * C; ++i) b[strip * stride_ + i] = V{};
    if (terms_ % C != 0)
      for (int64_t i = 0; i < order_; ++i) b[terms_ / C * stride_ + i * C + terms_ % C] = V{};
  }

  // Lanes from arrays of `size` numbers, `stride` apart.
  static void load_lanes(const T* from, int64_t stride, int64_t size, int64_t count, int64_t readable,
                         const int32_t* place, V* to) {
    for (int64_t e = 0; e < size; e += L) {
      const int64_t rest = size - e < L ? size - e : L;
      const bool whole = (count - 1) * stride + e + L <= readable;
      V square[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        const T* const at = from + (l < count ? l : count - 1) * stride + e;
        square[l] = whole ? load(at) : load_part(at, rest);
      }
      transpose<T>(square);
      for (int i = 0; i < rest; ++i) to[place[e + i]] = square[i];
    }
  }

  // The way back, for the lanes whose status is ok.
  static void store_lanes(const V* from, int64_t stride, int64_t size, int64_t count, const int64_t* status,
                          const int32_t* place, T* to) {
    for (int64_t e = 0; e < size; e += L) {
      const int64_t rest = size - e < L ? size - e : L;
      V square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = from[place[e + (i < rest ? i : 0)]];
      transpose<T>(square);
      for (int64_t l = 0; l < count; ++l)
        if (status[l] == RegularizedInverse<T>::ok) store_part(to + l * stride + e, square[l], rest);
    }
  }

  // U of B'B + reg I over u, with the reciprocals of its diagonal; the status of the first `count` lanes.
  void factor(const V* b, V reg, const T* weight, int64_t count, V* u, int64_t* status) const {
    V* const reciprocal = reciprocals(u);
    V* const squared = reciprocal + padded_;
    for (int64_t row = 0; row < padded_; row += R) with_rows(row, [&]<int Rows>() { gram<Rows>(b, u, row); });
    for (int64_t i = 0; i < padded_; ++i) {
      V& diagonal = *element(u, i, i);
      diagonal = i < order_ ? diagonal + reg : V{} + T(1);
    }
    for (int64_t row = 0; row < padded_; row += R)
      with_rows(row, [&]<int Rows>() { eliminate<Rows>(u, reciprocal, squared, row); });
    report(squared, reg, any_plain_ ? trace(b, u) : V{}, weight, count, status);
  }

  // X of A X = x over `strips` strips, `stride` vectors apart.
  void substitute(const V* u, V* x, int64_t strips, int64_t stride) const {
    const V* const reciprocal = reciprocals(u);
    for (int64_t row = 0; row < padded_; row += R)
      with_rows(row, [&]<int Rows>() {
        for (int64_t strip = 0; strip < strips; ++strip) forward<Rows, C>(u, reciprocal, x + strip * stride, row);
      });
    for (int64_t row = (padded_ - 1) / R * R; row >= 0; row -= R)
      with_rows(row, [&]<int Rows>() {
        for (int64_t strip = 0; strip < strips; ++strip) backward<Rows>(u, reciprocal, x + strip * stride, row);
      });
  }

  // The inverses over b.
  void invert(const V* u, V* b) const { substitute(u, b, strips(), stride_); }

  // z = B' y, both in `columns` strips, `stride` vectors apart; y[terms] is zero where the terms do not fill a strip.
  void project(const V* b, const V* y, V* z, int64_t columns, int64_t stride) const {
    for (int64_t row = 0; row < padded_; row += R)
      with_rows(row, [&]<int Rows>() {
        for (int64_t column = 0; column < columns; ++column) {
          Block<Rows> c = {};
          for (int64_t strip = 0; strip < strips(); ++strip)
            accumulate<Rows, C, 1, C, 1>(C, b + strip * stride_ + row * C, y + column * stride + strip * C * C, c);
          put<Rows, C>(c, z + column * stride + row * C);
        }
      });
  }

  // y = B z.
  void expand(const V* b, const V* z, V* y, int64_t columns, int64_t stride) const {
    constexpr int kStrips = R / C;
    for (int64_t strip = 0; strip < strips();) {
      const bool several = strip + kStrips <= strips();
      for (int64_t column = 0; column < columns; ++column) {
        V* const to = y + column * stride + strip * C * C;
        if (several)
          expand_strips<kStrips>(b + strip * stride_, z + column * stride, to);
        else
          expand_strips<1>(b + strip * stride_, z + column * stride, to);
      }
      strip += several ? kStrips : 1;
    }
  }

 private:
  template <int Rows>
  using Block = V[Rows][C];

  // task.operator()<Rows>() for the rows of the block at `row`.
  template <class Task>
  [[gnu::always_inline]] inline void with_rows(int64_t row, const Task& task) const {
    if (H == R || padded_ - row >= R)
      task.template operator()<R>();
    else
      task.template operator()<H>();
  }

  template <class Vector>
  Vector* element(Vector* u, int64_t i, int64_t j) const {
    return u + (j / R * padded_ + i) * R + j % R;
  }
  template <class Vector>
  Vector* reciprocals(Vector* u) const {
    return u + ceil_div(padded_, R) * R * padded_;
  }

  // c[r][p] += sum_k a[r * RowStep + k * DepthStep] * x[k * XDepthStep + p * XStep]
  template <int Rows, int RowStep, int DepthStep, int XDepthStep, int XStep>
  [[gnu::always_inline]] static inline void accumulate(int64_t depth, const V* a, const V* x, Block<Rows>& c) {
    for (int64_t k = 0; k < depth; ++k, a += DepthStep, x += XDepthStep) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int p = 0; p < C; ++p) c[r][p] += x[p * XStep] * a[r * RowStep];
    }
  }

  template <int Rows, int Step>
  [[gnu::always_inline]] static inline void put(const Block<Rows>& c, V* to) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < C; ++p) to[r * Step + p] = c[r][p];
  }

  // The terms of `Strips` strips of B z.
  template <int Strips>
  void expand_strips(const V* b, const V* z, V* y) const {
    Block<C> c[Strips] = {};
    for (int64_t i = 0; i < order_; ++i)
#pragma GCC unroll 4
      for (int s = 0; s < Strips; ++s) accumulate<C, 1, C, C, 1>(1, b + s * stride_ + i * C, z + i * C, c[s]);
#pragma GCC unroll 4
    for (int s = 0; s < Strips; ++s) put<C, C>(c[s], y + s * C * C);
  }

  // Rows row .. row + Rows - 1 of B'B, from the diagonal's block on.
  template <int Rows>
  void gram(const V* b, V* u, int64_t row) const {
    for (int64_t column = row; column < padded_; column += C) {
      Block<Rows> c = {};
      for (int64_t strip = 0; strip < strips(); ++strip) {
        const V* const terms = b + strip * stride_;
        accumulate<Rows, C, 1, 1, C>(C, terms + row * C, terms + column * C, c);
      }
      put<Rows, R>(c, element(u, row, column));
    }
  }

  // Rows row .. row + Rows - 1 of columns that are Step vectors a row wide, minus what the rows above subtract.
  template <int Rows, int Step>
  [[gnu::always_inline]] static inline void subtract(const V* above, const V* x, int64_t row, Block<Rows>& c) {
    accumulate<Rows, 1, R, Step, 1>(row, above, x, c);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < C; ++p) c[r][p] = x[(row + r) * Step + p] - c[r][p];
  }

  // Those rows of U' y = x.
  template <int Rows, int Step>
  void forward(const V* u, const V* reciprocal, V* x, int64_t row) const {
    Block<Rows> c = {};
    subtract<Rows, Step>(element(u, 0, row), x, row, c);
    const V* const diagonal = element(u, row, row);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < C; ++p) c[r][p] *= reciprocal[row + r];
#pragma GCC unroll 8
      for (int s = r + 1; s < Rows; ++s)
#pragma GCC unroll 2
        for (int p = 0; p < C; ++p) c[s][p] -= c[r][p] * diagonal[r * R + s];
    }
    put<Rows, Step>(c, x + row * Step);
  }

  // Those rows of U x = y.
  template <int Rows>
  void backward(const V* u, const V* reciprocal, V* x, int64_t row) const {
    Block<Rows> c = {};
    for (int64_t k = row + Rows; k < padded_; k += R)
      accumulate<Rows, R, 1, C, 1>(padded_ - k < R ? padded_ - k : R, element(u, row, k), x + k * C, c);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < C; ++p) c[r][p] = x[(row + r) * C + p] - c[r][p];
    const V* const diagonal = element(u, row, row);
#pragma GCC unroll 8
    for (int r = Rows - 1; r >= 0; --r) {
#pragma GCC unroll 2
      for (int p = 0; p < C; ++p) c[r][p] *= reciprocal[row + r];
#pragma GCC unroll 8
      for (int s = 0; s < r; ++s)
#pragma GCC unroll 2
        for (int p = 0; p < C; ++p) c[s][p] -= c[r][p] * diagonal[s * R + r];
    }
    put<Rows, C>(c, x + row * C);
  }

  // Rows row .. row + Rows - 1 of U over those of A.
  template <int Rows>
  void eliminate(V* u, V* reciprocal, V* squared, int64_t row) const {
    V* const diagonal = element(u, row, row);
#pragma GCC unroll 4
    for (int p = 0; p < Rows; p += C) {
      Block<Rows> c = {};
      subtract<Rows, R>(element(u, 0, row), element(u, 0, row + p), row, c);
      put<Rows, R>(c, diagonal + p);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const V pivot = diagonal[r * R + r], root = square_root(pivot), inverse = T(1) / root;
      squared[row + r] = pivot;
      diagonal[r * R + r] = root;
      reciprocal[row + r] = inverse;
#pragma GCC unroll 8
      for (int s = r + 1; s < Rows; ++s) diagonal[r * R + s] *= inverse;
#pragma GCC unroll 8
      for (int s = r + 1; s < Rows; ++s)
#pragma GCC unroll 8
        for (int t = s; t < Rows; ++t) diagonal[s * R + t] -= diagonal[r * R + s] * diagonal[r * R + t];
    }
    for (int64_t column = row + Rows; column < padded_; column += C)
      forward<Rows, R>(u, reciprocal, element(u, 0, column), row);
  }

  static V square_root(V v) {
    alignas(TPEXT_VECTOR_BYTES) T lanes[L];
    store(lanes, v);
    for (int l = 0; l < L; ++l) lanes[l] = sizeof(T) == 4 ? __builtin_sqrtf(lanes[l]) : __builtin_sqrt(lanes[l]);
    return load(lanes);
  }

  // That of R W, as for a single matrix (blocked.h).
  V trace(const V* b, V* u) const {
    V* const x = reciprocals(u) + 2 * padded_;
    V sum = {};
    for (int64_t strip = 0; strip < strips(); ++strip) {
      for (int64_t i = 0; i < padded_ * C; ++i) x[i] = b[strip * stride_ + i];
      for (int64_t row = 0; row < padded_; row += R)
        with_rows(row, [&]<int Rows>() { forward<Rows, C>(u, reciprocals(u), x, row); });
      for (int64_t i = 0; i < padded_ * C; ++i) sum += x[i] * x[i];
    }
    return sum;
  }

  // Whether each lane's factorisation came to its end. Comparisons are written to fail for NaN.
  void report(const V* squared, V reg, V trace, const T* weight, int64_t count, int64_t* status) const {
    Bits<T> regular = (Bits<T>)(V{} == V{});
    for (int64_t i = 0; i < order_; ++i)
      regular &= (Bits<T>)(squared[i] > T(0)) & (Bits<T>)(squared[i] <= Constants<T>::largest);
    if (any_plain_) {
      const V loss = static_cast<T>(order_) - trace;
      constexpr T most = static_cast<T>(kGreatestLoss);
      regular &= (Bits<T>)(reg > T(0)) | ((Bits<T>)(loss <= most) & (Bits<T>)(-loss <= most));
    }
    for (int64_t l = 0; l < count; ++l)
      status[l] =
          regular[l] != 0 ? RegularizedInverse<T>::ok : failure(weight + l * rows_ * columns_, rows_ * columns_);
  }

  int64_t rows_, columns_;
  bool tall_;
  int64_t order_;   // k
  int64_t terms_;   // m
  int64_t padded_;  // k in whole halves of blocks
  int64_t stride_;  // of the strips of B
  bool any_plain_;
};

// Operations of groups that are worth a further thread, some 20 microseconds: as long as it takes to wake one.
constexpr double kGroupOperationsPerThread = 2e6;

// task(first matrix, number of matrices, memory) for each group of a batch, each with `memory` vectors of its thread's,
// zeroed in the beginning. `operations` are those of a group.
template <class T, class Task>
inline void for_groups(int64_t batch, double operations, int64_t memory, int max_threads, const Task& task) {
  constexpr int64_t L = kLanes<T>;
  const int64_t groups = ceil_div(batch, L);
  const double worth = static_cast<double>(groups) * operations / kGroupOperationsPerThread + 1;
  int64_t threads = worth < max_threads ? static_cast<int64_t>(worth) : max_threads;
  if (threads > groups) threads = groups;
  const Buffer<Vec<T>> all(threads * memory, true);
  const auto run = [&](int64_t thread, int64_t team) {
    for (int64_t i = part_begin(groups, team, thread); i < part_begin(groups, team, thread + 1); ++i)
      task(i * L, batch - i * L < L ? batch - i * L : L, all.get() + thread * memory);
  };
  // A quarter of the time that 64 matrices of 4 x 4 take would go into a team of one.
  if (threads == 1) return run(0, 1);
#pragma omp parallel num_threads(static_cast<int>(threads))
  run(thread_index(), thread_count());
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
