// Windows of 2 x 2 and their elements in vectors: a lane is a window.
//
// Where planes [H, W] are of even sizes and W is a power of two up to two vectors, the L windows that follow any
// multiple of a row of windows are those of 4 L consecutive elements, over the borders of planes: four vectors, whose
// elements' numbers have the window's column bit at 0 and its row bit at log2 W. Taking a bit out of a pair of vectors,
// or putting it in again, is one shuffle a vector. Any other even plane goes a row of windows at a time.
#pragma once

#include "cpu/transpose.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// The elements of a window in raster order.
template <class T>
struct Quad {
  Vec<T> at[4];
};

// i with a bit put in at a place, and with the bit there taken out.
constexpr int with_bit(int i, int place, int bit) {
  return (i >> place << (place + 1)) | bit << place | (i & ((1 << place) - 1));
}
constexpr int without_bit(int i, int place) { return (i >> (place + 1) << place) | (i & ((1 << place) - 1)); }

// Of 2 L elements those whose number has this bit at this place.
template <class T, int Place, int Bit, int... I>
inline Vec<T> take(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T>(a, b, std::integer_sequence<int, with_bit(I, Place, Bit)...>());
}

// One half (First = 0 or L) of the 2 L elements that `clear` and `set` were taken from.
template <class T, int Place, int First, int... I>
inline Vec<T> put(Vec<T> clear, Vec<T> set, std::integer_sequence<int, I...>) {
  return shuffle<T>(
      clear, set,
      std::integer_sequence<int, (((First + I) >> Place & 1) * kLanes<T> + without_bit(First + I, Place))...>());
}

// Windows of rows of 2^Shift elements.
template <class T, int Shift>
struct PackedWindows {
  static constexpr int L = kLanes<T>;
  static constexpr std::make_integer_sequence<int, L> lanes{};

  // The elements of the first `count` <= L windows.
  static Quad<T> load(const T* from, int64_t count) {
    Vec<T> v[4];
    for (int i = 0; i < 4; ++i) v[i] = 4 * count > i * L ? load_part(from + i * L, 4 * count - i * L) : Vec<T>{};
    const Vec<T> left[2] = {take<T, 0, 0>(v[0], v[1], lanes), take<T, 0, 0>(v[2], v[3], lanes)};
    const Vec<T> right[2] = {take<T, 0, 1>(v[0], v[1], lanes), take<T, 0, 1>(v[2], v[3], lanes)};
    return {{take<T, Shift - 1, 0>(left[0], left[1], lanes), take<T, Shift - 1, 0>(right[0], right[1], lanes),
             take<T, Shift - 1, 1>(left[0], left[1], lanes), take<T, Shift - 1, 1>(right[0], right[1], lanes)}};
  }

  static void store(T* to, const Quad<T>& quad, int64_t count) {
    Vec<T> left[2], right[2];
    left[0] = put<T, Shift - 1, 0>(quad.at[0], quad.at[2], lanes);
    left[1] = put<T, Shift - 1, L>(quad.at[0], quad.at[2], lanes);
    right[0] = put<T, Shift - 1, 0>(quad.at[1], quad.at[3], lanes);
    right[1] = put<T, Shift - 1, L>(quad.at[1], quad.at[3], lanes);
    Vec<T> v[4];
    for (int i = 0; i < 2; ++i) {
      v[2 * i] = put<T, 0, 0>(left[i], right[i], lanes);
      v[2 * i + 1] = put<T, 0, L>(left[i], right[i], lanes);
    }
    for (int i = 0; i < 4; ++i)
      if (4 * count > i * L) store_part(to + i * L, v[i], 4 * count - i * L);
  }

  // The place in the window, 0 .. 3, that an index of a plane names.
  static Bits<T> place(Bits<T> index) { return (index & 1) | ((index >> Shift & 1) << 1); }
};

// Windows that lie side by side in a plane whose rows have `width` elements; `base` is the first one's index.
template <class T>
struct RowWindows {
  static constexpr int L = kLanes<T>;
  static constexpr std::make_integer_sequence<int, L> lanes{};
  int64_t width;
  int64_t base;

  Quad<T> load(const T* from, int64_t count) const {
    Quad<T> quad;
    for (int row = 0; row < 2; ++row) {
      const T* const at = from + row * width;
      const Vec<T> a = load_part(at, 2 * count), b = 2 * count > L ? load_part(at + L, 2 * count - L) : Vec<T>{};
      quad.at[2 * row] = take<T, 0, 0>(a, b, lanes);
      quad.at[2 * row + 1] = take<T, 0, 1>(a, b, lanes);
    }
    return quad;
  }

  void store(T* to, const Quad<T>& quad, int64_t count) const {
    for (int row = 0; row < 2; ++row) {
      T* const at = to + row * width;
      const Vec<T> left = quad.at[2 * row], right = quad.at[2 * row + 1];
      store_part(at, put<T, 0, 0>(left, right, lanes), 2 * count);
      if (2 * count > L) store_part(at + L, put<T, 0, L>(left, right, lanes), 2 * count - L);
    }
  }

  Bits<T> place(Bits<T> index) const {
    using Lane = decltype(index[0] + 0);
    Bits<T> first;
    for (int l = 0; l < L; ++l) first[l] = 2 * l;
    const Bits<T> from_first = index - (first + static_cast<Lane>(base));
    return (from_first & 1) | ((from_first >= static_cast<Lane>(width)) & 2);
  }
};

// The first `count` of int64 indices, in lanes of T's size; planes have less than 2^31 elements.
template <class T>
inline Bits<T> load_indices(const int64_t* from, int64_t count) {
  const T* const words = reinterpret_cast<const T*>(from);
  if constexpr (sizeof(T) == 8) {
    return (Bits<T>)load_part(words, count);
  } else {
    // The lower halves, which come first.
    constexpr int L = kLanes<T>;
    const Vec<T> high = 2 * count > L ? load_part(words + L, 2 * count - L) : Vec<T>{};
    return (Bits<T>)take<T, 0, 0>(load_part(words, 2 * count), high, std::make_integer_sequence<int, L>());
  }
}

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
