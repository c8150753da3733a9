// probe_difference:  D_k = unpool(a(y + sigma n_k) - a(y), indices),  n_k normal noise made on the way
//
// Noise comes in blocks of 4 L windows of a row, as counter_normal makes it. Pools of 2 x 2 over even planes, and
// layers without one, put such a block in its place in vectors of windows (windows.h), its activations of y taken once
// for all draws. Any other pool goes by runs of planes within a row: zeros, then each window's value to its index.
//
// Traffic, threads and why that is deterministic stand in pooled_difference.h. No memory but the arrays.
#include "cpu/philox.h"
#include "cpu/pooled_difference.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Windows of a row that go through all draws before the next do, where planes are not in vectors of windows.
constexpr int64_t kRun = 4096;

template <class T, Activation A>
struct ProbeKernel {
  static constexpr int L = kLanes<T>;
  const ProbeDifference<T>& args;
  PhiloxKeys keys;
  int64_t plane, pooled, row, elements;  // H W, h w, C h w, B C H W

  explicit ProbeKernel(const ProbeDifference<T>& args)
      : args(args),
        keys(args.counter.seed),
        plane(args.pool.height * args.pool.width),
        pooled(args.pool.pooled_height * args.pool.pooled_width),
        row(args.channels * pooled),
        elements(args.rows * args.channels * plane) {}

  // Noise of the 4 L numbers of a row from number `first` on, a multiple of four.
  inline void noise(int64_t b, int64_t k, int64_t first, Vec<T> (&z)[4]) const {
    const NoiseCounter& counter = args.counter;
    const uint32_t stream = counter.stream + static_cast<uint32_t>(k) * args.stream_stride;
    normals<T>(keys, counter.step, stream, counter.first_row + static_cast<uint32_t>(b), first / 4, z);
  }

  inline Vec<T> moved(Vec<T> y, Vec<T> z) const { return activate<A, T>(z * args.sigma + y, args.alpha); }

  // Blocks of 4 L windows of a row; S = 0: of elements without a pool.
  template <int S>
  void packed(int64_t begin, int64_t end) const {
    const int64_t blocks = ceil_div(row, 4 * L);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / blocks, first = at % blocks * 4 * L, window = b * row + first;
      Vec<T> y[4]{}, clean[4]{};
      Bits<T> place[4]{};
      for (int i = 0; i < 4; ++i) {
        const int64_t count = row - first - i * L;
        if (count <= 0) break;
        y[i] = load_part(args.output + window + i * L, count);
        clean[i] = activate<A, T>(y[i], args.alpha);
        if constexpr (S > 0)
          place[i] = PackedWindows<T, S>::place(load_indices<T>(args.indices + window + i * L, count));
      }
      for (int64_t k = 0; k < args.draws; ++k) {
        Vec<T> z[4];
        noise(b, k, first, z);
        for (int i = 0; i < 4; ++i) {
          const int64_t left = row - first - i * L, count = left < L ? left : L;
          if (count <= 0) break;
          const Vec<T> difference = moved(y[i], z[i]) - clean[i];
          if constexpr (S > 0) {
            Quad<T> quad;
            for (int j = 0; j < 4; ++j) quad.at[j] = place[i] == j ? difference : Vec<T>{};
            PackedWindows<T, S>::store(args.difference + k * elements + 4 * (window + i * L), quad, count);
          } else {
            store_part(args.difference + k * elements + window + i * L, difference, count);
          }
        }
      }
    }
  }

  // Planes of [B, C] whatever the pool, in runs within a row.
  void any_planes(int64_t begin, int64_t end) const {
    const int64_t longest = pooled < kRun ? kRun / pooled : 1;
    for (int64_t p = begin; p < end;) {
      const int64_t b = p / args.channels, c = p % args.channels;
      int64_t run = args.channels - c < end - p ? args.channels - c : end - p;
      run = run < longest ? run : longest;
      for (int64_t k = 0; k < args.draws; ++k) any_run(b, c, run, k);
      p += run;
    }
  }

  void any_run(int64_t b, int64_t c, int64_t run, int64_t k) const {
    T* to = args.difference + k * elements + (b * args.channels + c) * plane;
    for (int64_t at = 0; at < run * plane; at += L) store_part(to + at, Vec<T>{}, run * plane - at);
    const T* const y = args.output + b * row;
    const int64_t* const indices = args.indices + b * row;
    const int64_t end = (c + run) * pooled;
    int64_t window = c * pooled, left = pooled;
    for (int64_t first = window / 4 * 4; first < end; first += 4 * L) {
      Vec<T> z[4];
      noise(b, k, first, z);
      T lanes[4 * L];
      for (int i = 0; i < 4; ++i) {
        const int64_t count = row - first - i * L;
        if (count <= 0) break;
        const Vec<T> from = load_part(y + first + i * L, count);
        store(lanes + i * L, moved(from, z[i]) - activate<A, T>(from, args.alpha));
      }
      for (; window < end && window < first + 4 * L; ++window) {
        const int64_t index = indices[window];
        if (index >= 0 && index < plane) to[index] = lanes[window - first];
        if (--left == 0) to += plane, left = pooled;
      }
    }
  }
};

template <class T>
void run_probe(const ProbeDifference<T>& args, int threads) {
  with_activation(args.activation, [&](auto activation) {
    const ProbeKernel<T, decltype(activation)::value> kernel(args);
    const int64_t all = args.draws * kernel.elements;
    const auto packed = [&](auto shift) {
      in_parts(args.rows * ceil_div(kernel.row, 4 * kLanes<T>), all, threads,
               [&](int64_t begin, int64_t end) { kernel.template packed<decltype(shift)::value>(begin, end); });
    };
    if (args.pool.kernel == 0) return packed(Shift<0>());
    if (is_even(args.pool) && with_packed<T>(args.pool, packed)) return;
    in_parts(args.rows * args.channels, all, threads,
             [&](int64_t begin, int64_t end) { kernel.any_planes(begin, end); });
  });
}

}  // namespace

void probe_difference(const ProbeDifference<float>& args, int threads) { run_probe(args, threads); }
void probe_difference(const ProbeDifference<double>& args, int threads) { run_probe(args, threads); }

}  // namespace tpext::cpu::TPEXT_CAPABILITY
