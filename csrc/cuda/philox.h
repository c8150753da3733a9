// Counter-based normal noise (core/counter_normal.h), one group of four numbers at a time. The same integers as
// cpu/philox.h, numbers to within rounding.
#pragma once

#include <cmath>

#include "core/counter_normal.h"
#include "cuda/device.h"

namespace tpext::cuda {

template <class T, int N>
__device__ inline T horner(T x, const T (&coefficients)[N]) {
  T sum = coefficients[N - 1];
#pragma unroll
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// Sine and cosine of t quarter turns, |t| <= 1/2, by cpu/philox.h's polynomials: those of the toolkit keep memory for
// angles of any size.
__device__ inline void sine_and_cosine(float t, float& sine, float& cosine) {
  constexpr float s[] = {1.5707963217083446823f, -0.64596346023342800708f, 0.079680032770421878155f,
                         -0.0046016578911808581716f};
  constexpr float c[] = {-1.233697737428465065f, 0.25360355767857714088f, -0.020418191908190335064f};
  sine = horner(t * t, s) * t;
  cosine = horner(t * t, c) * (t * t) + 1.0f;
}
__device__ inline void sine_and_cosine(double t, double& sine, double& cosine) {
  constexpr double s[] = {1.5707963267948966192,     -0.64596409750624625216,   0.079692626246166920812,
                          -0.0046817541353147393212, 0.00016044118472567202523, -3.598842711288921836e-6,
                          5.691926149930545996e-8,   -6.6274308776223041982e-10};
  constexpr double c[] = {-1.2337005501361698161,    0.25366950790104686641,      -0.020863480763313686702,
                          0.00091926027420283861996, -0.000025202036852758282839, 4.7106114397331716696e-7,
                          -6.3213947782627668496e-9};
  sine = horner(t * t, s) * t;
  cosine = horner(t * t, c) * (t * t) + 1.0;
}

// r cos(angle) and r sin(angle) of the words of a radius and an angle.
template <class T>
__device__ inline void box_muller(uint32_t radius_word, uint32_t angle_word, T& first, T& second) {
  constexpr T kUnit = T(2.3283064365386963e-10);  // 2^-32
  const bool high = (radius_word >> 31) != 0;
  const T distance = static_cast<T>(high ? ~radius_word : radius_word);
  const T log_u = high ? log1p(-distance * kUnit) : log((distance + T(1)) * kUnit);
  const T radius = sqrt(T(-2) * log_u);
  // The angle from the nearest quarter turn, then the quarter turns.
  T sine, cosine;
  sine_and_cosine(static_cast<T>(static_cast<int32_t>(angle_word << 2)) * kUnit, sine, cosine);
  const uint32_t quadrant = (angle_word + 0x20000000u) >> 30;
  const T x = quadrant % 2 == 0 ? cosine : sine, y = quadrant % 2 == 0 ? sine : cosine;
  first = radius * (quadrant == 1 || quadrant == 2 ? -x : x);
  second = radius * (quadrant >= 2 ? -y : y);
}

// The standard normal numbers 4 group .. 4 group + 3 of row `row` of the batch.
template <class T>
__device__ inline void normals(const NoiseCounter& counter, uint32_t stream, int64_t row, int64_t group, T (&z)[4]) {
  uint32_t low = static_cast<uint32_t>(counter.seed), high = static_cast<uint32_t>(counter.seed >> 32);
  uint32_t w[4] = {static_cast<uint32_t>(group), counter.first_row + static_cast<uint32_t>(row), stream, counter.step};
#pragma unroll
  for (int round = 0; round < philox::kRounds; ++round) {
    const uint64_t p0 = uint64_t{philox::kMultiplier0} * w[0], p1 = uint64_t{philox::kMultiplier1} * w[2];
    w[0] = static_cast<uint32_t>(p1 >> 32) ^ w[1] ^ low;
    w[1] = static_cast<uint32_t>(p1);
    w[2] = static_cast<uint32_t>(p0 >> 32) ^ w[3] ^ high;
    w[3] = static_cast<uint32_t>(p0);
    low += philox::kWeyl0;
    high += philox::kWeyl1;
  }
  box_muller(w[0], w[1], z[0], z[1]);
  box_muller(w[2], w[3], z[2], z[3]);
}

}  // namespace tpext::cuda
