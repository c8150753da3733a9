// code_difference:   D_k = unpool(a(y_k), indices_k) - unpool(a(y), indices),  (y_k, indices_k) = max_pool(a(z + dz_k))
//
// Pools of 2 x 2 over even planes run in vectors of windows (windows.h): a block of them is loaded, its activations of
// y taken once, and its draws follow one another. The maximum is found before a, which rises: one activation a window
// rather than four.
// Any other pool goes plane by plane: the maxima of each row across, then those of the rows a window has, a vector of
// windows at a time; zeros, each window's value to its index in raster order, less the clean code, which is made once.
//
// Traffic, threads and why that is deterministic stand in pooled_difference.h. No memory but the arrays, and some
// planes a thread where pools are not of 2 x 2.
#include "cpu/pooled_difference.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// A lane of Bits.
template <class T>
using Lane = std::remove_reference_t<decltype(Bits<T>{}[0])>;

// The largest of what is met one after the other, and its place: of equal ones the first, of NaN the last.
template <class T>
struct Best {
  Bits<T> place;  // where nothing met is above minus infinity
  Vec<T> value = Vec<T>{} - T(__builtin_inff());

  inline void meet(Vec<T> other, Bits<T> at) {
    const Bits<T> wins = (other > value) | (other != other);
    value = wins ? other : value;
    place = wins ? at : place;
  }
};

// A thread's memory for planes of any pool.
template <class T>
class PlaneScratch {
 public:
  static constexpr int L = kLanes<T>;
  int64_t windows;  // of a row, in whole vectors
  int64_t stride;   // across; windows beyond the first are within the plane, so it is no larger than that is wide
  int64_t margin;   // by how much a vector of windows, one of which has a column in the plane, reaches beyond it
  int64_t padded;   // elements of a row with both margins, in whole vectors
  int64_t size;     // of all
  T* code;          // [H, W]: unpool(a(y), indices)
  T* row;           // [padded]: a row of z + dz between minus infinities
  T* maxima;        // [H, windows]: of each row's part of a window
  T* columns;       // [H, windows]: where they are, as Bits

  explicit PlaneScratch(const Pool& pool)
      : windows(whole(pool.pooled_width)),
        stride(pool.pooled_width > 1 ? pool.stride : 1),
        margin((L - 1) * stride),
        // one more, as every second element is read in pairs
        padded(whole(2 * margin + pool.width + 1)),
        size(whole(pool.height * pool.width) + padded + 2 * pool.height * windows),
        height_(pool.height) {}

  // That of one thread, in memory for all of them.
  PlaneScratch at(T* memory) const {
    PlaneScratch placed = *this;
    placed.row = memory;
    placed.maxima = placed.row + padded;
    placed.columns = placed.maxima + height_ * windows;
    placed.code = placed.columns + height_ * windows;
    return placed;
  }

 private:
  int64_t height_;
  static int64_t whole(int64_t count) { return ceil_div(count, L) * L; }
};

template <class T, Activation A>
struct CodeKernel {
  static constexpr int L = kLanes<T>;
  const CodeDifference<T>& args;
  int64_t plane, pooled, elements;  // H W, h w, B C H W

  explicit CodeKernel(const CodeDifference<T>& args)
      : args(args),
        plane(args.pool.height * args.pool.width),
        pooled(args.pool.pooled_height * args.pool.pooled_width),
        elements(args.planes * plane) {}

  // The windows from number `window` of [B, C, h, w] on, whose elements begin at `element`.
  template <class Windows>
  inline void block(const Windows& windows, int64_t window, int64_t element, int64_t count) const {
    const Quad<T> z = windows.load(args.preactivation + element, count);
    const Vec<T> clean = activate<A, T>(load_part(args.output + window, count), args.alpha);
    const Bits<T> place = windows.place(load_indices<T>(args.indices + window, count));
    for (int64_t k = 0; k < args.draws; ++k) {
      const Quad<T> change = windows.load(args.change + k * elements + element, count);
      Vec<T> best = keep<A, T>(z.at[0] + change.at[0]);
      Bits<T> found{};
      for (int i = 1; i < 4; ++i) {
        const Vec<T> other = keep<A, T>(z.at[i] + change.at[i]);
        const Bits<T> wins = (other > best) | (other != other);
        best = wins ? other : best;
        found = wins ? Bits<T>{} + i : found;
      }
      const Vec<T> value = activate<A, T>(activate<A, T>(best, args.alpha), args.alpha);
      Quad<T> difference;
      for (int i = 0; i < 4; ++i) {
        if (args.noisy)
          difference.at[i] = (found == i ? value : Vec<T>{}) - (place == i ? clean : Vec<T>{});
        else
          difference.at[i] = place == i ? value - clean : Vec<T>{};
      }
      windows.store(args.difference + k * elements + element, difference, count);
    }
  }

  template <int S>
  void packed(int64_t begin, int64_t end) const {
    const int64_t windows = args.planes * pooled;
    for (int64_t at = begin * L; at < end * L; at += L) {
      const int64_t count = windows - at < L ? windows - at : L;
      block(PackedWindows<T, S>(), at, 4 * at, count);
    }
  }

  // Rows of windows.
  void rows(int64_t begin, int64_t end) const {
    const int64_t w = args.pool.pooled_width, W = args.pool.width;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t j = 0; j < w; j += L) {
        const int64_t base = row % args.pool.pooled_height * 2 * W + 2 * j;
        block(RowWindows<T>{W, base}, row * w + j, row * 2 * W + 2 * j, w - j < L ? w - j : L);
      }
  }

  void without_pool(int64_t begin, int64_t end) const {
    for (int64_t at = begin * L; at < end * L; at += L) {
      const int64_t count = elements - at;
      if (count <= 0) return;
      const Vec<T> z = load_part(args.preactivation + at, count);
      const Vec<T> clean = activate<A, T>(load_part(args.output + at, count), args.alpha);
      for (int64_t k = 0; k < args.draws; ++k) {
        const Vec<T> y = activate<A, T>(z + load_part(args.change + k * elements + at, count), args.alpha);
        store_part(args.difference + k * elements + at, activate<A, T>(y, args.alpha) - clean, count);
      }
    }
  }

  // Every `stride`th element; reads no further than `stride` vectors.
  static Vec<T> strided(const T* from, int64_t stride) {
    if (stride == 1) return load(from);
    if (stride == 2) return take<T, 0, 0>(load(from), load(from + L), std::make_integer_sequence<int, L>());
    Vec<T> v;
    for (int l = 0; l < L; ++l) v[l] = from[l * stride];
    return v;
  }

  // The maximum of a row of z + dz, kept to where a rises, in each window across it, and its column.
  void row_maxima(const T* z, const T* change, int64_t r, const PlaneScratch<T>& scratch) const {
    const int64_t W = args.pool.width, kernel = args.pool.kernel, stride = scratch.stride;
    for (int64_t at = 0; at < W; at += L) {
      const Vec<T> moved = load_part(z + at, W - at) + load_part(change + at, W - at);
      store_part(scratch.row + scratch.margin + at, keep<A, T>(moved), W - at);
    }
    Bits<T> offsets;
    for (int l = 0; l < L; ++l) offsets[l] = static_cast<Lane<T>>(l * stride);
    for (int64_t j = 0; j < args.pool.pooled_width; j += L) {
      // Columns that are outside the plane for all L windows are left out.
      const int64_t left = j * stride - args.pool.padding;
      const int64_t first = left > -scratch.margin ? left : -scratch.margin;
      const int64_t last = left + kernel < W ? left + kernel : W;
      const Bits<T> from = offsets + static_cast<Lane<T>>(first);
      Best<T> best{from < 0 ? Bits<T>{} : from};
      for (int64_t c = first; c < last; ++c)
        best.meet(strided(scratch.row + scratch.margin + c, stride), offsets + static_cast<Lane<T>>(c));
      store(scratch.maxima + r * scratch.windows + j, best.value);
      store(scratch.columns + r * scratch.windows + j, (Vec<T>)best.place);
    }
  }

  void any_planes(int64_t begin, int64_t end, const PlaneScratch<T>& scratch) const {
    for (int64_t at = 0; at < scratch.padded; at += L) store(scratch.row + at, Vec<T>{} - T(__builtin_inff()));
    for (int64_t p = begin; p < end; ++p) {
      clean_code(p, scratch.code);
      for (int64_t k = 0; k < args.draws; ++k) any_plane(p, k, scratch);
    }
  }

  inline bool in_plane(int64_t index) const { return index >= 0 && index < plane; }

  // unpool(a(y), indices) of plane p.
  void clean_code(int64_t p, T* code) const {
    const T* const y = args.output + p * pooled;
    const int64_t* const indices = args.indices + p * pooled;
    for (int64_t at = 0; at < plane; at += L) store_part(code + at, Vec<T>{}, plane - at);
    for (int64_t window = 0; window < pooled; window += L) {
      const int64_t count = pooled - window < L ? pooled - window : L;
      T lanes[L];
      store(lanes, activate<A, T>(load_part(y + window, count), args.alpha));
      for (int64_t l = 0; l < count; ++l)
        if (in_plane(indices[window + l])) code[indices[window + l]] = lanes[l];
    }
  }

  void any_plane(int64_t p, int64_t k, const PlaneScratch<T>& scratch) const {
    const Pool& pool = args.pool;
    const int64_t W = pool.width, w = pool.pooled_width;
    const T *const z = args.preactivation + p * plane, *const change = args.change + k * elements + p * plane;
    const int64_t* const indices = args.indices + p * pooled;
    T* const to = args.difference + k * elements + p * plane;
    for (int64_t r = 0; r < pool.height; ++r) row_maxima(z + r * W, change + r * W, r, scratch);
    for (int64_t at = 0; at < plane; at += L) store_part(to + at, Vec<T>{}, plane - at);
    for (int64_t i = 0; i < pool.pooled_height; ++i) {
      const int64_t top = i * pool.stride - pool.padding, first = top > 0 ? top : 0;
      const int64_t last = top + pool.kernel < pool.height ? top + pool.kernel : pool.height;
      for (int64_t j = 0; j < w; j += L) {
        const auto place = [&](int64_t r) {
          return (Bits<T>)load(scratch.columns + r * scratch.windows + j) + static_cast<Lane<T>>(r * W);
        };
        Best<T> best{place(first)};
        for (int64_t r = first; r < last; ++r) best.meet(load(scratch.maxima + r * scratch.windows + j), place(r));
        T lanes[L];
        Lane<T> places[L];
        store(lanes, activate<A, T>(activate<A, T>(best.value, args.alpha), args.alpha));
        std::memcpy(places, &best.place, sizeof places);
        const int64_t window = i * w + j, count = w - j < L ? w - j : L;
        for (int64_t l = 0; l < count; ++l) {
          const int64_t place = args.noisy ? places[l] : indices[window + l];
          if (in_plane(place)) to[place] = lanes[l];
        }
      }
    }
    for (int64_t at = 0; at < plane; at += L)
      store_part(to + at, load_part(to + at, plane - at) - load_part(scratch.code + at, plane - at), plane - at);
  }
};

template <class T>
void run_code(const CodeDifference<T>& args, int threads) {
  with_activation(args.activation, [&](auto activation) {
    const CodeKernel<T, decltype(activation)::value> kernel(args);
    const int64_t all = args.draws * kernel.elements;
    if (args.pool.kernel == 0)
      return in_parts(ceil_div(kernel.elements, kLanes<T>), all, threads,
                      [&](int64_t begin, int64_t end) { kernel.without_pool(begin, end); });
    if (is_even(args.pool)) {
      const auto packed = [&](auto shift) {
        in_parts(ceil_div(args.planes * kernel.pooled, kLanes<T>), all, threads,
                 [&](int64_t begin, int64_t end) { kernel.template packed<decltype(shift)::value>(begin, end); });
      };
      if (with_packed<T>(args.pool, packed)) return;
      return in_parts(args.planes * args.pool.pooled_height, all, threads,
                      [&](int64_t begin, int64_t end) { kernel.rows(begin, end); });
    }
    const PlaneScratch<T> scratch(args.pool);
    const Buffer<T> memory(scratch.size * threads);
    in_parts(args.planes, all, threads, [&](int64_t begin, int64_t end) {
      kernel.any_planes(begin, end, scratch.at(memory.get() + thread_index() * scratch.size));
    });
  });
}

}  // namespace

void code_difference(const CodeDifference<float>& args, int threads) { run_code(args, threads); }
void code_difference(const CodeDifference<double>& args, int threads) { run_code(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
