// Small products against a packed matrix: the inner loop of every recurrent sweep.
//
// A matrix M [depth, H] is packed once a call into panels one vector wide, panel p holding L neighbouring columns (L
// lanes) of all rows one after another. The last panel is moved back to end with the last column: it overlaps the one
// before and computes some columns twice, to the same bits, so that every load and store in an epilogue is a whole
// vector; only where H < L a panel is padded with zeros. A product of `rows` row
// vectors a_r with `panels` neighbouring panels keeps its rows x panels accumulators in registers through the whole
// depth:
//     c[r][p] = sum_k a_r[k] * M[k][p]        (k ascending, one accumulator an element)
// A row vector may come in pieces that lie apart (the input, a one for the bias, the state before). The order of the
// sum does not depend on how rows and panels are grouped, so neither threads nor batch size change a bit.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/large_memory.h"
#include "cpu/simd.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// AVX-512 has 32 registers, the others 16: 24 (8 x 3) and 12 (6 x 2 or 4 x 3) of them accumulate.
constexpr int kMaxRows = TPEXT_VECTOR_BYTES == 64 ? 8 : 6;
constexpr int kMaxPanels = 4;

constexpr int max_panels(int rows) {
  const int registers = TPEXT_VECTOR_BYTES == 64 ? 24 : 12;
  const int panels = registers / rows;
  return panels < 1 ? 1 : panels > kMaxPanels ? kMaxPanels : panels;
}

// Part `index` of `total` items in `parts` nearly equal parts: its first item. Part sizes differ by one at most, so no
// remainder falls to a narrow, latency-bound product.
inline int64_t part_begin(int64_t total, int64_t parts, int64_t index) { return total * index / parts; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
inline int64_t panel_count(int64_t hidden) {
  return ceil_div(hidden, kLanes<T>);
}

// The first column of a panel; columns from there to the end of the row, at least a vector's unless the row is shorter.
template <class T>
inline int64_t panel_column(int64_t hidden, int64_t panel) {
  const int64_t column = panel * kLanes<T>, last = hidden - kLanes<T>;
  return column <= last || last < 0 ? column : last;
}

// Memory aligned to a cache line, in huge pages where it is large, zeroed on request.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, bool zero = false) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    prefer_huge_pages(data_, bytes);
    if (zero) std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Packs `depth` rows of panel p of M: M[k][c] = weight[k * row_stride + c * column_stride]. Returns whether all its
// numbers are finite.
template <class T>
inline bool pack_panel(const T* weight, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t hidden,
                       int64_t panel, T* packed) {
  const int64_t first = panel_column<T>(hidden, panel);
  const int64_t columns = hidden - first < kLanes<T> ? hidden : kLanes<T>;
  weight += first * column_stride;
  Vec<T> check = {};  // turns NaN for NaN and infinity
  if (column_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const Vec<T> row = load_part(weight + k * row_stride, columns);
      store(packed + k * kLanes<T>, row);
      check += row * T(0);
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      T* to = packed + k * kLanes<T>;
      for (int64_t c = 0; c < columns; ++c) to[c] = weight[k * row_stride + c * column_stride];
      for (int64_t c = columns; c < kLanes<T>; ++c) to[c] = T(0);
      check += load(to) * T(0);
    }
  }
  bool finite = true;
  for (int i = 0; i < kLanes<T>; ++i) finite = finite && check[i] == T(0);
  return finite;
}

// A piece of each row vector, at[r][0 .. depth), or interleaved, at[0][r + k * Step]; the next piece goes on in the
// packed rows where this one ends.
template <class T>
struct Piece {
  int64_t depth;
  const T* const* at;
};

// Memory that is needed next, to be asked for during a product: `step` bytes of each array at every k. A sweep
// touches its rows in pieces that the processor's own prefetching does not follow, and a burst of requests before or
// after a product would fill the few places that a core has for them and stall it. Any address may be asked for.
struct Ahead {
  uintptr_t from[3];
  int64_t step;

  template <int Rows>
  void ask(int64_t k) const {
    // With few rows there is little to fetch, and loads are what a product waits for.
    if constexpr (Rows >= 4)
      for (const uintptr_t array : from) prefetch(array + static_cast<uintptr_t>(k * step));
  }
};

template <class T, int Rows, int Panels, bool Ask, int Step>
void product(const Piece<T>* pieces, int count, const T* packed, int64_t panel_stride, const Ahead& ahead, Vec<T>* c) {
  Vec<T> sum[Rows][Panels] = {};
  for (int piece = 0; piece < count; ++piece) {
    const int64_t depth = pieces[piece].depth;
    const T* row[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) row[r] = Step == 1 ? pieces[piece].at[r] : pieces[piece].at[0] + r;
    for (int64_t k = 0; k < depth * Step; k += Step, packed += kLanes<T>) {
      if constexpr (Ask) ahead.template ask<Rows>(k);
      Vec<T> m[Panels];
#pragma GCC unroll 8
      for (int p = 0; p < Panels; ++p) m[p] = *reinterpret_cast<const Vec<T>*>(packed + p * panel_stride);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < Panels; ++p) sum[r][p] += m[p] * row[r][k];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < Panels; ++p) c[r * kMaxPanels + p] = sum[r][p];
}

template <class T>
using Product = void (*)(const Piece<T>* pieces, int count, const T* packed, int64_t panel_stride, const Ahead& ahead,
                         Vec<T>* c);

template <class T, int Rows, bool Ask, int Step>
constexpr Product<T> product_of(int panels) {
  static_assert(kMaxPanels == 4);
  constexpr int most = max_panels(Rows);
  if (panels == 1) return product<T, Rows, 1, Ask, Step>;
  if constexpr (most >= 2) {
    if (panels == 2) return product<T, Rows, 2, Ask, Step>;
  }
  if constexpr (most >= 3) {
    if (panels == 3) return product<T, Rows, 3, Ask, Step>;
  }
  return product<T, Rows, most, Ask, Step>;
}

// The product of a shape; with `Ask` it asks for the memory that is needed next. With a
// Step above 1 the row vectors are interleaved.
template <class T, bool Ask, int Step = 1>
inline Product<T> find_product(int rows, int panels) {
  switch (rows) {
    case 1: return product_of<T, 1, Ask, Step>(panels);
    case 2: return product_of<T, 2, Ask, Step>(panels);
    case 3: return product_of<T, 3, Ask, Step>(panels);
    case 4: return product_of<T, 4, Ask, Step>(panels);
    case 5: return product_of<T, 5, Ask, Step>(panels);
    case 6: return product_of<T, 6, Ask, Step>(panels);
#if TPEXT_VECTOR_BYTES == 64
    case 7: return product_of<T, 7, Ask, Step>(panels);
    case 8: return product_of<T, 8, Ask, Step>(panels);
#endif
    default: __builtin_unreachable();
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
