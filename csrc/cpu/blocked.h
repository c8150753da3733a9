// One matrix after another, in panels: what regularized_inverse and regularized_solve are made of beyond the groups of
// small matrices (interleaved.h).
//
// With B = W (or W' where M < N), of m = max(M, N) rows (terms) and k = min(M, N) columns (the order), and U the
// Cholesky factor of the smaller Gram matrix, U'U = A = B'B + reg I:
//   pack        B in panels
//   gram        the upper triangle of A, over which the factor is written
//   factor      blocks of rows of U: their square on the diagonal by one thread, then the rest of the rows, then what
//               they subtract from all rows below
//   substitute  U' Y = X and U X = Y for a group of panels of columns, by one thread and without waiting
//   project     B' Y, what is substituted for to solve with a tall W; the other threads do it during the first square,
//               with the part of the Gram matrix that the square does not need
//   expand      B X, what a wide W makes of the solution
//   retained    without a ridge, how much of each row of B the factor gives back: refuses singular matrices
// All heavy work is the block of panels.h, its a(r, k) read down a column (U', B') or along a row (U, B). The depth k
// goes in slices, so that the three panels of x stay in the first-level cache while the rows pass by. The order k is
// padded to whole blocks of rows with an identity.
//
// The triangular solves substitute within blocks rather than multiply by inverted ones: the vector lanes are different
// columns, so that a substitution is as parallel as a product and nothing is lost in accuracy.
//
// Memory: m k + k^2 + m numbers for a matrix in work, to solve for K rows with a tall matrix K k more; 3 L k a thread.
// Deterministic: which rows and panels are computed together, and by which thread, changes no operation of an element.
#pragma once

#include "core/regularized_inverse.h"
#include "cpu/interleaved.h"
#include "cpu/panels.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Rows of U that are eliminated together: the square on the diagonal is work for a single thread, and three barriers
// follow from each, which cost far more than arithmetic where other programs want the processors.
constexpr int64_t kPivots = 128;

template <class T>
class Blocked {
 public:
  static constexpr int64_t L = kLanes<T>, R = kRows<T>;

  // `any_plain`: a matrix may come without a ridge.
  Blocked(int64_t rows, int64_t columns, bool any_plain)
      : rows_(rows),
        columns_(columns),
        tall_(columns <= rows),
        order_(tall_ ? columns : rows),
        terms_(tall_ ? rows : columns),
        padded_(ceil_div(order_, R) * R),
        panels_(ceil_div(order_, L)),
        any_plain_(any_plain) {}

  // Of whole panels, and what the smallest matrix costs anyway: to invert, and to solve for `count` rows.
  double operations() const {
    const double k = whole(order_), m = whole(terms_);
    return 5e4 + k * k * (3 * m + k / 3);
  }
  double operations(int64_t count) const {
    const double k = whole(order_), m = whole(terms_);
    return 5e4 + k * k * (m + k / 3) + 2 * whole(count) * k * (m + k);
  }
  // Numbers of the memory for a matrix, of which `count` are solved for, and for a thread; multiples of a vector.
  int64_t shared_size(int64_t count = 0) const {
    const int64_t projected = tall_ ? ceil_div(count, L) * L * padded_ : 0;
    const int64_t retained = any_plain_ ? ceil_div(terms_, L) * L : 0;
    return panels_ * L * (terms_ + padded_) + 2 * ceil_div(padded_, L) * L + retained + projected;
  }
  int64_t private_size() const { return kGroup * (padded_ < kDepth ? kDepth : padded_) * L; }

  // Inverts one matrix, by one thread or by all of a team, and returns its status.
  int64_t invert(const T* weight, T reg, T* inverse, T* shared, T* own, bool alone) const {
    const Work work(*this, reg, shared, alone);
    if (!factor(weight, work, own, 0, [](int64_t) {})) return failure(weight, rows_ * columns_);
    const Groups groups(0, ceil_div(terms_, L), work.threads);
    share(alone, groups.count, [&](int64_t i) {
      invert_panels(weight, inverse, work, {own, padded_}, groups.begin(i), groups.begin(i + 1));
    });
    return RegularizedInverse<T>::ok;
  }

  // Solves for the `count` rows of rhs, likewise.
  int64_t solve(const T* weight, T reg, const T* rhs, int64_t count, T* solution, T* shared, T* own, bool alone) const {
    const Work work(*this, reg, shared, alone);
    const Groups groups(0, ceil_div(count, L), work.threads);
    const bool regular = factor(weight, work, own, tall_ ? groups.count : 0, [&](int64_t i) {
      project(rhs, count, work, own, groups.begin(i), groups.begin(i + 1));
    });
    if (!regular) return failure(weight, rows_ * columns_);
    share(alone, groups.count, [&](int64_t i) {
      if (tall_)
        solve_tall(count, solution, work, groups.begin(i), groups.begin(i + 1));
      else
        solve_wide(rhs, count, solution, work, {own, padded_}, groups.begin(i), groups.begin(i + 1));
    });
    return RegularizedInverse<T>::ok;
  }

 private:
  // What a matrix in work has in memory, and how many threads work on it.
  struct Work {
    Panels<T> b, u;
    T *reciprocal, *squared;  // of the diagonal of U
    T* retained;              // of each row of B, without a ridge
    Panels<T> z;              // B' Y of a tall matrix
    T reg;
    bool alone;
    int64_t threads;

    Work(const Blocked& matrix, T reg_, T* shared, bool alone_)
        : b{shared, matrix.terms_},
          u{b.data + matrix.panels_ * b.stride(), matrix.padded_},
          reciprocal(u.data + matrix.panels_ * u.stride()),
          squared(reciprocal + ceil_div(matrix.padded_, L) * L),
          retained(squared + ceil_div(matrix.padded_, L) * L),
          z{retained + (matrix.any_plain_ ? ceil_div(matrix.terms_, L) * L : 0), matrix.padded_},
          reg(reg_),
          alone(alone_),
          threads(alone_ ? 1 : thread_count()) {}
  };

  static double whole(int64_t count) { return static_cast<double>(ceil_div(count, L) * L); }

  // Lanes of a panel of `columns` columns.
  static int64_t lanes(int64_t panel, int64_t columns) { return columns - panel * L < L ? columns - panel * L : L; }

  // Panel `panel` of B [m, k].
  void pack(const T* weight, int64_t panel, Panels<T> b) const {
    const int64_t first = panel * L, columns = lanes(panel, order_);
    if (tall_)
      pack_straight(weight + first, columns_, columns, terms_, b.at(panel, 0));
    else
      pack_transposed(weight + first * columns_, columns_, columns, terms_, b.at(panel, 0));
  }

  // Panels [begin, end) of B'B + reg I on and above the diagonal.
  void gram(const Work& work, int64_t begin, int64_t end) const {
    const Panels<T> b = work.b, u = work.u;
    const int64_t last_row = end * L < padded_ ? end * L : padded_;
    for (int64_t k = 0; k < terms_; k += kDepth) {
      const int64_t depth = terms_ - k < kDepth ? terms_ - k : kDepth;
      for (int64_t row = 0; row < last_row; row += R) {
        const int64_t first = row / L > begin ? row / L : begin;
        with_count(end - first, [&]<int Count>() {
          Block<T, Count> sum = {};
          accumulate<1, L>(depth, b.element(k, row), b.at(first, k), b.stride(), sum);
          for_block<Count>(u.at(first, row), u.stride(),
                           [&](int r, int p, Vec<T>& a) { a = k == 0 ? sum[r][p] : a + sum[r][p]; });
        });
      }
    }
    for (int64_t i = begin * L; i < last_row; ++i) *u.element(i, i) = i < order_ ? *u.element(i, i) + work.reg : T(1);
  }

  // U over the upper triangle of A, from packing on; returns whether there is one. While one thread factors the first
  // square, the others compute the Gram matrix beside it and the `extra` tasks, which need B alone.
  template <class Task>
  bool factor(const T* weight, const Work& work, T* own, int64_t extra, const Task& task) const {
    share(work.alone, panels_, [&](int64_t panel) { pack(weight, panel, work.b); });
    const int64_t first = panels_ < kPivots / L ? panels_ : kPivots / L;
    // Long panels first.
    const Groups square(0, first, 2 * work.threads), beside(first, panels_, 2 * work.threads);
    const auto gram_group = [&](const Groups& groups, int64_t i) { gram(work, groups.begin(i), groups.begin(i + 1)); };
    share(work.alone, square.count, [&](int64_t i) { gram_group(square, square.count - 1 - i); });
    for (int64_t from = 0; from < padded_; from += kPivots) {
      const int64_t to = padded_ - from < kPivots ? padded_ : from + kPivots;
      share(work.alone, from == 0 ? 1 + beside.count + extra : 1, [&](int64_t i) {
        if (i == 0)
          factor_square(work, from, to);
        else if (i <= beside.count)
          gram_group(beside, beside.count - i);
        else
          task(i - 1 - beside.count);
      });
      eliminate(work, from, to);
    }
    return positive(work.squared) && (work.reg != T(0) || full_rank(weight, work, own));
  }

  // The square of the rows [from, to) on the diagonal.
  static void factor_square(const Work& work, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row += R) {
      pivots(work.u, work.reciprocal, work.squared, row, from);
      const Groups groups(row / L + 1, ceil_div(to, L), 1);
      for (int64_t i = 0; i < groups.count; ++i)
        with_count(groups.begin(i + 1) - groups.begin(i), [&]<int Count>() {
          forward<Count>(work.u, work.reciprocal, work.u, groups.begin(i), row, from, row, true);
        });
    }
  }

  // What is right of the square, and what it subtracts from the rows below.
  void eliminate(const Work& work, int64_t from, int64_t to) const {
    const Panels<T> u = work.u;
    const Groups groups(ceil_div(to, L), panels_, work.threads);
    if (groups.count == 0) return;
    share(work.alone, groups.count, [&](int64_t i) {
      with_count(groups.begin(i + 1) - groups.begin(i), [&]<int Count>() {
        for (int64_t row = from; row < to; row += R)
          forward<Count>(u, work.reciprocal, u, groups.begin(i), row, from, row, true);
      });
    });
    share(work.alone, groups.count, [&](int64_t i) {
      const int64_t group = groups.count - 1 - i, end = groups.begin(group + 1);
      for (int64_t row = to; row < end * L && row < padded_; row += R) {
        const int64_t first = row / L > groups.begin(group) ? row / L : groups.begin(group);
        with_count(end - first,
                   [&]<int Count>() { forward<Count>(u, work.reciprocal, u, first, row, from, to, false); });
      }
    });
  }

  // Whether the factorisation came to its end. Comparisons are written to fail for NaN.
  bool positive(const T* squared) const {
    bool all = true;
    for (int64_t i = 0; i < order_; ++i) all = all && squared[i] > T(0) && squared[i] <= Constants<T>::largest;
    return all;
  }

  // Whether the trace of R W, which is that of (B U^-1)' (B U^-1), is the order (core/regularized_inverse.h): the sum
  // over B's rows of what is retained of each, the square of its length after the forward substitution. Summed in one
  // order however the rows are shared.
  bool full_rank(const T* weight, const Work& work, T* own) const {
    const Groups groups(0, ceil_div(terms_, L), work.threads);
    share(work.alone, groups.count, [&](int64_t i) {
      const int64_t begin = groups.begin(i), end = groups.begin(i + 1);
      const Panels<T> x{own, padded_};
      pack_rows(weight, x, begin, end);
      with_count(end - begin, [&]<int Count>() { reduce<Count>(work, x); });
      for (int64_t panel = begin; panel < end; ++panel) {
        Vec<T> sum = {};
        for (int64_t row = 0; row < padded_; ++row) {
          const Vec<T> v = load(x.at(panel - begin, row));
          sum += v * v;
        }
        store(work.retained + panel * L, sum);
      }
    });
    T trace = 0;
    for (int64_t i = 0; i < terms_; ++i) trace += work.retained[i];
    const T loss = static_cast<T>(order_) - trace;
    return loss <= static_cast<T>(kGreatestLoss) && -loss <= static_cast<T>(kGreatestLoss);
  }

  // Y of U' Y = x, over x.
  template <int Count>
  void reduce(const Work& work, Panels<T> x) const {
    for (int64_t from = 0; from < padded_; from += kDepth) {
      const int64_t to = padded_ - from < kDepth ? padded_ : from + kDepth;
      for (int64_t row = from; row < padded_; row += R)
        forward<Count>(work.u, work.reciprocal, x, 0, row, from, row < to ? row : to, row < to);
    }
  }

  // X of A X = x, over x.
  template <int Count>
  void substitute(const Work& work, Panels<T> x) const {
    reduce<Count>(work, x);
    for (int64_t from = (padded_ - 1) / kDepth * kDepth; from >= 0; from -= kDepth) {
      const int64_t to = padded_ - from < kDepth ? padded_ : from + kDepth;
      for (int64_t row = to - R; row >= 0; row -= R)
        backward<Count>(work.u, work.reciprocal, x, row, row < from ? from : row + R, to, row >= from);
    }
  }

  // The rows of a panel of x that the order was padded with.
  void clear_padding(T* panel) const {
    std::memset(panel + order_ * L, 0, static_cast<size_t>((padded_ - order_) * L) * sizeof(T));
  }

  // Panels [begin, end) of B', a row of B a lane.
  void pack_rows(const T* weight, Panels<T> x, int64_t begin, int64_t end) const {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * L, columns = lanes(panel, terms_);
      T* const to = x.at(panel - begin, 0);
      if (tall_)
        pack_transposed(weight + first * columns_, columns_, columns, order_, to);
      else
        pack_straight(weight + first, columns_, columns, order_, to);
      clear_padding(to);
    }
  }

  // Panels [begin, end) of the inverse (of its transposed where M < N).
  void invert_panels(const T* weight, T* inverse, const Work& work, Panels<T> x, int64_t begin, int64_t end) const {
    pack_rows(weight, x, begin, end);
    with_count(end - begin, [&]<int Count>() { substitute<Count>(work, x); });
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * L, columns = lanes(panel, terms_);
      const T* const from = x.at(panel - begin, 0);
      if (tall_)
        unpack_straight(from, columns, order_, inverse + first, rows_);
      else
        unpack_transposed(from, columns, order_, inverse + first * rows_, rows_);
    }
  }

  // Panels [begin, end) of B' Y, a row of rhs a lane.
  void project(const T* rhs, int64_t count, const Work& work, T* own, int64_t begin, int64_t end) const {
    for (int64_t k = 0; k < terms_; k += kDepth) {
      const int64_t depth = terms_ - k < kDepth ? terms_ - k : kDepth;
      const Panels<T> y{own, depth}, z = work.z;
      for (int64_t panel = begin; panel < end; ++panel)
        pack_transposed(rhs + panel * L * terms_ + k, terms_, lanes(panel, count), depth, y.at(panel - begin, 0));
      with_count(end - begin, [&]<int Count>() {
        for (int64_t row = 0; row < padded_; row += R) {
          Block<T, Count> sum = {};
          accumulate<1, L>(depth, work.b.element(k, row), y.data, y.stride(), sum);
          for_block<Count>(z.at(begin, row), z.stride(),
                           [&](int r, int p, Vec<T>& v) { v = k == 0 ? sum[r][p] : v + sum[r][p]; });
        }
      });
    }
  }

  void solve_tall(int64_t count, T* solution, const Work& work, int64_t begin, int64_t end) const {
    with_count(end - begin, [&]<int Count>() { substitute<Count>(work, {work.z.at(begin, 0), padded_}); });
    for (int64_t panel = begin; panel < end; ++panel)
      unpack_transposed(work.z.at(panel, 0), lanes(panel, count), order_, solution + panel * L * order_, order_);
  }

  void solve_wide(const T* rhs, int64_t count, T* solution, const Work& work, Panels<T> x, int64_t begin,
                  int64_t end) const {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_transposed(rhs + panel * L * order_, order_, lanes(panel, count), order_, x.at(panel - begin, 0));
      clear_padding(x.at(panel - begin, 0));
    }
    with_count(end - begin, [&]<int Count>() {
      substitute<Count>(work, x);
      for (int64_t term = 0; term < terms_; term += L) expand<Count>(count, solution, work.b, x, begin, term);
    });
  }

  // L terms of B X from `term` on, into the solution.
  template <int Count>
  void expand(int64_t count, T* solution, Panels<T> b, Panels<T> x, int64_t begin, int64_t term) const {
    alignas(TPEXT_VECTOR_BYTES) T square[Count * L * L];
    const Panels<T> terms{square, L};
    for (int64_t row = 0; row < L && term + row < terms_; row += R) {
      // Terms beyond the last are read from what follows B in memory, and not stored.
      Block<T, Count> sum = {};
      for (int64_t panel = 0; panel < panels_; ++panel)
        accumulate<L, 1>(lanes(panel, order_), b.at(panel, term + row), x.at(0, panel * L), x.stride(), sum);
      for_block<Count>(terms.at(0, row), terms.stride(), [&](int r, int p, Vec<T>& v) { v = sum[r][p]; });
    }
    const int64_t depth = terms_ - term < L ? terms_ - term : L;
    for (int p = 0; p < Count; ++p)
      unpack_transposed(terms.at(p, 0), lanes(begin + p, count), depth, solution + (begin + p) * L * terms_ + term,
                        terms_);
  }

  int64_t rows_, columns_;
  bool tall_;
  int64_t order_;   // k
  int64_t terms_;   // m
  int64_t padded_;  // k in whole blocks of rows
  int64_t panels_;  // of B and U
  bool any_plain_;
};

// Operations worth a further thread, some 5 microseconds.
constexpr double kOperationsPerThread = 1e6;

// task(matrix, shared memory, own memory, whether alone) -> its status, for each matrix of a batch, of so many
// operations. Each thread takes as many whole matrices as every other; those left over, or a single one, are shared by
// panels with a barrier after each step. A matrix too small to share stays on one thread.
template <class T, class Task>
inline void for_matrices(int64_t batch, double operations, int64_t shared, int64_t own, int max_threads,
                         int64_t* status, const Task& task) {
  const double work = operations / kOperationsPerThread, worth = static_cast<double>(batch) * work + 1;
  int64_t threads = worth < max_threads ? static_cast<int64_t>(worth) : max_threads;
  if (work < 1 && batch < threads) threads = batch;
  const int64_t whole = work < 1 ? batch : batch / threads * threads;
  const Buffer<T> memory(threads * own + (whole > 0 ? threads : 1) * shared);
  const auto run = [&](int64_t thread, int64_t team) {
    T* const mine = memory.get() + thread * own;
    T* const common = memory.get() + threads * own;
    for (int64_t i = part_begin(whole, team, thread); i < part_begin(whole, team, thread + 1); ++i)
      status[i] = task(i, common + thread * shared, mine, true);
    if (whole > 0 && whole < batch) {
      // The first thread's memory becomes everyone's.
#pragma omp barrier
    }
    for (int64_t i = whole; i < batch; ++i) {
      const int64_t result = task(i, common, mine, false);
      if (thread == 0) status[i] = result;
    }
  };
  if (threads == 1) return run(0, 1);
#pragma omp parallel num_threads(static_cast<int>(threads))
  run(thread_index(), thread_count());
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
