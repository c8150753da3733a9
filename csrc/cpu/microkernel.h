// Small products against a packed matrix: the inner loop of every recurrent sweep.
//
// A matrix M [H, H] is packed once a call into panels one vector wide, panel p holding the columns p*L .. p*L + L - 1
// (L lanes) of all H rows one after another, the last one padded with zeros. A product of `rows` row vectors a_r with
// `panels` neighbouring panels keeps its rows x panels accumulators in registers through the whole depth:
//     c[r][p] = sum_k a_r[k] * M[k][p]        (k ascending, one accumulator an element)
// The order of the sum does not depend on how rows and panels are grouped, so neither threads nor batch size change a
// bit.
#pragma once

#include <cstdlib>
#include <new>

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

// Memory aligned to a cache line, zeroed on request.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, bool zero = false) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    if (zero) std::memset(data_, 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Packs panel p of M = W or, transposed, of M = W'. Returns whether all its numbers are finite.
template <class T>
inline bool pack_panel(const T* weight, bool transposed, int64_t hidden, int64_t panel, T* packed) {
  const int64_t first = panel * kLanes<T>;
  const int64_t columns = hidden - first < kLanes<T> ? hidden - first : kLanes<T>;
  T check = 0;
  for (int64_t k = 0; k < hidden; ++k, packed += kLanes<T>) {
    for (int64_t c = 0; c < kLanes<T>; ++c) {
      const T value = c >= columns ? T(0)
                      : transposed ? weight[(first + c) * hidden + k]
                                   : weight[k * hidden + first + c];
      packed[c] = value;
      check += value * T(0);  // NaN for NaN and infinity
    }
  }
  return check == T(0);
}

template <class T, int Rows, int Panels>
void product(int64_t depth, const T* const* a, const T* packed, int64_t panel_stride, Vec<T>* c) {
  Vec<T> sum[Rows][Panels] = {};
  const T* row[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) row[r] = a[r];
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> m[Panels];
#pragma GCC unroll 8
    for (int p = 0; p < Panels; ++p) m[p] = *reinterpret_cast<const Vec<T>*>(packed + p * panel_stride + k * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < Panels; ++p) sum[r][p] += m[p] * row[r][k];
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < Panels; ++p) c[r * kMaxPanels + p] = sum[r][p];
}

template <class T>
using Product = void (*)(int64_t depth, const T* const* a, const T* packed, int64_t panel_stride, Vec<T>* c);

template <class T, int Rows>
constexpr Product<T> product_of(int panels) {
  static_assert(kMaxPanels == 4);
  constexpr int most = max_panels(Rows);
  if (panels == 1) return product<T, Rows, 1>;
  if constexpr (most >= 2) {
    if (panels == 2) return product<T, Rows, 2>;
  }
  if constexpr (most >= 3) {
    if (panels == 3) return product<T, Rows, 3>;
  }
  return product<T, Rows, most>;
}

template <class T>
inline Product<T> find_product(int rows, int panels) {
  switch (rows) {
    case 1: return product_of<T, 1>(panels);
    case 2: return product_of<T, 2>(panels);
    case 3: return product_of<T, 3>(panels);
    case 4: return product_of<T, 4>(panels);
    case 5: return product_of<T, 5>(panels);
    case 6: return product_of<T, 6>(panels);
#if TPEXT_VECTOR_BYTES == 64
    case 7: return product_of<T, 7>(panels);
    case 8: return product_of<T, 8>(panels);
#endif
    default: __builtin_unreachable();
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
