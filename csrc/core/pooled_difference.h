// What the kernels of differences behind an activation and a pool need to know: sizes, numbers and pointers, shared by
// every backend.
#pragma once

#include <cstdint>

#include "core/counter_normal.h"

namespace tpext {

// elu: v for v > 0, alpha (e^v - 1) else, alpha > 0.
enum class Activation { elu, relu, tanh, identity };

// Max pooling of planes [H, W] to [h, w] as torch does it, h = (H + 2 padding - kernel) / stride + 1, and its inverse.
// An index is a position in the plane, row-major. Unpooling fills a plane with zeros and puts the value of each window
// at its index, windows in raster order: where two name one position, the last one stays.
struct Pool {
  int64_t kernel;  // 0: none, and planes are no planes but any elements
  int64_t stride;
  int64_t padding;
  int64_t height, width;                // H, W
  int64_t pooled_height, pooled_width;  // h, w
};

// D_k = unpool(a(y_k), indices_k) - unpool(a(y), indices),  (y_k, indices_k) = max_pool(a(z + dz_k))
//
// `noisy`: whether the first unpooling takes indices_k; else the clean ones in both. Without a pool a(a(z + dz_k)) -
// a(y).
//
// The pool's maximum is taken of z + dz_k kept to where a rises in T's precision: that is the maximum of a, and its
// first place in the window but for ties that rounding of a makes. NaN wins, the last one of a window.
template <class T>
struct CodeDifference {
  int64_t draws;   // K
  int64_t planes;  // B C
  Pool pool;
  Activation activation;
  T alpha;
  bool noisy;
  const T* preactivation;  // z [B, C, H, W]
  const T* change;         // dz [K, B, C, H, W]
  const T* output;         // y [B, C, h, w]
  const int64_t* indices;  // [B, C, h, w]; null without a pool
  T* difference;           // D [K, B, C, H, W]
};

// D_k = unpool(a(y + sigma n_k) - a(y), indices), n_k the noise [B, C h w] at the counter with k stream_stride added to
// its stream.
template <class T>
struct ProbeDifference {
  int64_t draws;     // K
  int64_t rows;      // B
  int64_t channels;  // C; without a pool 1
  Pool pool;         // without one height is 1 and width the number of elements of a row
  Activation activation;
  T alpha;
  T sigma;
  NoiseCounter counter;
  uint32_t stream_stride;
  const T* output;         // y [B, C, h, w]
  const int64_t* indices;  // [B, C, h, w]; null without a pool
  T* difference;           // D [K, B, C, H, W]
};

}  // namespace tpext
