// code_difference:   D_k = unpool(a(y_k), indices_k) - unpool(a(y), indices),  (y_k, indices_k) = max_pool(a(z + dz_k))
// probe_difference:  D_k = unpool(a(y + sigma n_k) - a(y), indices),  n_k normal noise made on the way
//
// Definitions and layouts stand in core/pooled_difference.h. Pools of 2 x 2 over even planes: a thread takes one window
// through all draws (probe_difference: the four windows of one group of noise), reads its elements, y and index once,
// and writes its elements. Any other pool: a thread takes one element of a plane and looks through the windows that
// cover it, last one first, for one whose index it is; a window is searched by each of its elements, out of the cache.
//
// Every element of D is written once, by one thread, from what that thread has read: no atomics, the same bits always.
// No memory but the arrays; an index outside its plane matches nothing.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/philox.h"

namespace tpext::cuda {
namespace {

constexpr int kThreads = 256;

// Where a is constant in T's precision, as in cpu/pooled_difference.h.
template <class T>
constexpr T kFlatElu = sizeof(T) == 4 ? T(17.328679f) : T(37.429947750237048);
template <class T>
constexpr T kFlatTanh = sizeof(T) == 4 ? T(9.010913f) : T(19.061547465398496);

// Kept to where a rises. NaN passes.
template <class T>
__device__ inline T keep(Activation a, T v) {
  if (a == Activation::elu) return v < -kFlatElu<T> ? -kFlatElu<T> : v;
  if (a == Activation::relu) return v < T(0) ? T(0) : v;
  if (a == Activation::tanh) return v < -kFlatTanh<T> ? -kFlatTanh<T> : v > kFlatTanh<T> ? kFlatTanh<T> : v;
  return v;
}

template <class T>
__device__ inline T activate(Activation a, T alpha, T v) {
  if (a == Activation::elu) return v < T(0) ? alpha * expm1(v) : v;
  if (a == Activation::relu) return v < T(0) ? T(0) : v;
  if (a == Activation::tanh) return tanh(v);
  return v;
}

// Elements of D's planes, whatever the pool.
__device__ inline int64_t plane_size(const Pool& pool) { return pool.height * pool.width; }
__device__ inline int64_t pooled_size(const Pool& pool) { return pool.pooled_height * pool.pooled_width; }

// The index in the plane of the first element of a window of 2 x 2.
__device__ inline int64_t corner(const Pool& pool, int64_t window) {
  const int64_t i = window / pool.pooled_width, j = window - i * pool.pooled_width;
  return 2 * (i * pool.width + j);
}

// Of element i of a window of 2 x 2, counted from its corner.
__device__ inline int64_t offset(const Pool& pool, int i) { return i / 2 * pool.width + i % 2; }

// In a plane everything fits 32 bits (csrc/bindings), whose divisions are quick.
struct PlanePool {
  int kernel, stride, padding, height, width, pooled_height, pooled_width;

  __device__ explicit PlanePool(const Pool& pool)
      : kernel(static_cast<int>(pool.kernel)),
        stride(static_cast<int>(pool.stride)),
        padding(static_cast<int>(pool.padding)),
        height(static_cast<int>(pool.height)),
        width(static_cast<int>(pool.width)),
        pooled_height(static_cast<int>(pool.pooled_height)),
        pooled_width(static_cast<int>(pool.pooled_width)) {}

  // The rows (or columns) of windows, of `count`, that cover a row (or column) of elements: first to last.
  __device__ void cover(int at, int count, int& first, int& last) const {
    at += padding;
    first = at < kernel ? 0 : (at - kernel) / stride + 1;
    last = at / stride < count ? at / stride : count - 1;
  }

  // The last window that covers `element` and whose index it is, or -1; index(window) gives a window's.
  template <class Index>
  __device__ int last_window(int element, const Index& index) const {
    int first_row, last_row, first_column, last_column;
    cover(element / width, pooled_height, first_row, last_row);
    cover(element % width, pooled_width, first_column, last_column);
    for (int i = last_row; i >= first_row; --i)
      for (int j = last_column; j >= first_column; --j)
        if (index(i * pooled_width + j) == element) return i * pooled_width + j;
    return -1;
  }

  // The maximum of z + dz in a window, kept to where a rises, and its index.
  template <class T>
  __device__ T maximum(Activation activation, const T* z, const T* change, int window, int& index) const {
    const int top = window / pooled_width * stride - padding, left = window % pooled_width * stride - padding;
    const int first_row = top > 0 ? top : 0, first_column = left > 0 ? left : 0;
    T best = T(-INFINITY);
    index = first_row * width + first_column;
    for (int r = first_row; r < top + kernel && r < height; ++r)
      for (int c = first_column; c < left + kernel && c < width; ++c) {
        const int at = r * width + c;
        const T value = keep(activation, z[at] + change[at]);
        if (value > best || value != value) best = value, index = at;
      }
    return best;
  }
};

template <class T>
__device__ inline T twice(const CodeDifference<T>& args, T v) {
  // A loop: two copies of the functions of double would spill registers.
#pragma unroll 1
  for (int times = 0; times < 2; ++times) v = activate(args.activation, args.alpha, v);
  return v;
}

// A thread an element; no pool.
template <class T>
__global__ void __launch_bounds__(kThreads) code_flat(const __grid_constant__ CodeDifference<T> args) {
  const int64_t at = int64_t{block_index()} * kThreads + thread_index();
  const int64_t elements = args.planes * plane_size(args.pool);
  if (at >= elements) return;
  const T clean = activate(args.activation, args.alpha, args.output[at]), z = args.preactivation[at];
  for (int64_t k = 0; k < args.draws; ++k)
    args.difference[k * elements + at] = twice(args, z + args.change[k * elements + at]) - clean;
}

// A thread an element; pools other than of 2 x 2.
template <class T>
__global__ void __launch_bounds__(kThreads) code_elements(const __grid_constant__ CodeDifference<T> args) {
  const int64_t at = int64_t{block_index()} * kThreads + thread_index();
  const int64_t plane = plane_size(args.pool), elements = args.planes * plane;
  if (at >= elements) return;
  const PlanePool pool(args.pool);
  const int64_t p = at / plane, pooled = p * pooled_size(args.pool);
  const int element = static_cast<int>(at - p * plane);
  const int clean_window = pool.last_window(element, [&](int window) { return args.indices[pooled + window]; });
  const T clean = clean_window < 0 ? T(0) : activate(args.activation, args.alpha, args.output[pooled + clean_window]);
  const T* const z = args.preactivation + p * plane;
  for (int64_t k = 0; k < args.draws; ++k) {
    const T* const change = args.change + k * elements + p * plane;
    // The maximum of the last window that was looked at.
    T best = T(0);
    const auto index_of = [&](int window) {
      int index;
      best = pool.maximum(args.activation, z, change, window, index);
      return index;
    };
    int window = clean_window;
    if (args.noisy)
      window = pool.last_window(element, index_of);
    else if (window >= 0)
      index_of(window);
    args.difference[k * elements + at] = (window < 0 ? T(0) : twice(args, best)) - clean;
  }
}

// A thread a window of 2 x 2.
template <class T>
__global__ void __launch_bounds__(kThreads) code_windows(const __grid_constant__ CodeDifference<T> args) {
  const int64_t at = int64_t{block_index()} * kThreads + thread_index();
  const int64_t plane = plane_size(args.pool), pooled = pooled_size(args.pool), elements = args.planes * plane;
  if (at >= args.planes * pooled) return;
  const int64_t p = at / pooled, first = corner(args.pool, at - p * pooled), begin = p * plane + first;
  const T clean = activate(args.activation, args.alpha, args.output[at]);
  const int64_t index = args.indices[at] - first;
  T z[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = args.preactivation[begin + offset(args.pool, i)];
  for (int64_t k = 0; k < args.draws; ++k) {
    const T* const change = args.change + k * elements + begin;
    T best = T(-INFINITY);
    int found = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T value = keep(args.activation, z[i] + change[offset(args.pool, i)]);
      if (value > best || value != value) best = value, found = i;
    }
    const T value = twice(args, best);
    T* const to = args.difference + k * elements + begin;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_clean = index == offset(args.pool, i), is_noisy = args.noisy ? found == i : is_clean;
      to[offset(args.pool, i)] = (is_noisy ? value : T(0)) - (is_clean ? clean : T(0));
    }
  }
}

template <class T>
__device__ inline T probe(const ProbeDifference<T>& args, T y, T z) {
  return activate(args.activation, args.alpha, args.sigma * z + y) - activate(args.activation, args.alpha, y);
}

template <class T>
__device__ inline uint32_t stream_of(const ProbeDifference<T>& args, int64_t k) {
  return args.counter.stream + static_cast<uint32_t>(k) * args.stream_stride;
}

// A thread a group of four numbers of a row: windows of 2 x 2, or elements where there is no pool.
template <class T>
__global__ void __launch_bounds__(kThreads) probe_groups(const __grid_constant__ ProbeDifference<T> args) {
  const int64_t plane = plane_size(args.pool), pooled = pooled_size(args.pool), row = args.channels * pooled;
  const int64_t groups = (row + 3) / 4, elements = args.rows * args.channels * plane;
  const int64_t at = int64_t{block_index()} * kThreads + thread_index();
  if (at >= args.rows * groups) return;
  const int64_t b = at / groups, group = at - b * groups;
  for (int64_t k = 0; k < args.draws; ++k) {
    T z[4];
    normals(args.counter, stream_of(args, k), b, group, z);
    T* const to = args.difference + k * elements;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (4 * group + n >= row) break;
      const int64_t number = b * row + 4 * group + n;
      const T value = probe(args, args.output[number], z[n]);
      if (args.pool.kernel == 0) {
        to[number] = value;
        continue;
      }
      const int64_t p = number / pooled, first = corner(args.pool, number - p * pooled);
      const int64_t index = args.indices[number] - first;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[p * plane + first + offset(args.pool, i)] = index == offset(args.pool, i) ? value : T(0);
    }
  }
}

// A thread an element; other pools.
template <class T>
__global__ void __launch_bounds__(kThreads) probe_elements(const __grid_constant__ ProbeDifference<T> args) {
  const int64_t plane = plane_size(args.pool), pooled = pooled_size(args.pool);
  const int64_t elements = args.rows * args.channels * plane;
  const int64_t at = int64_t{block_index()} * kThreads + thread_index();
  if (at >= elements) return;
  const int64_t p = at / plane, b = p / args.channels, first = p * pooled;
  const int window = PlanePool(args.pool).last_window(static_cast<int>(at - p * plane),
                                                      [&](int other) { return args.indices[first + other]; });
  const int64_t number = first + window - b * args.channels * pooled;
  for (int64_t k = 0; k < args.draws; ++k) {
    T value = T(0);
    if (window >= 0) {
      T z[4];
      normals(args.counter, stream_of(args, k), b, number / 4, z);
      const int n = static_cast<int>(number % 4);
      value = probe(args, args.output[first + window], n < 2 ? (n == 0 ? z[0] : z[1]) : (n == 2 ? z[2] : z[3]));
    }
    args.difference[k * elements + at] = value;
  }
}

bool is_even(const Pool& pool) {
  return pool.kernel == 2 && pool.stride == 2 && pool.padding == 0 && pool.height % 2 == 0 && pool.width % 2 == 0;
}

Shape shape_of(int64_t threads) { return {(threads + kThreads - 1) / kThreads, kThreads}; }

}  // namespace

template <class T>
void code_difference(const CodeDifference<T>& args, const Queue& queue) {
  const Pool& pool = args.pool;
  if (is_even(pool))
    return launch(code_windows<T>, shape_of(args.planes * pool.pooled_height * pool.pooled_width), queue, args);
  const Shape shape = shape_of(args.planes * pool.height * pool.width);
  if (pool.kernel == 0) return launch(code_flat<T>, shape, queue, args);
  launch(code_elements<T>, shape, queue, args);
}

template <class T>
void probe_difference(const ProbeDifference<T>& args, const Queue& queue) {
  const Pool& pool = args.pool;
  const int64_t row = args.channels * pool.pooled_height * pool.pooled_width;
  if (pool.kernel == 0 || is_even(pool))
    return launch(probe_groups<T>, shape_of(args.rows * ((row + 3) / 4)), queue, args);
  launch(probe_elements<T>, shape_of(args.rows * args.channels * pool.height * pool.width), queue, args);
}

template void code_difference<float>(const CodeDifference<float>&, const Queue&);
template void code_difference<double>(const CodeDifference<double>&, const Queue&);
template void probe_difference<float>(const ProbeDifference<float>&, const Queue&);
template void probe_difference<double>(const ProbeDifference<double>&, const Queue&);

}  // namespace tpext::cuda
