// What the kernel of counter-based normal noise needs to know: the counter, sizes and pointers, shared by every
// backend.
#pragma once

#include <cstdint>

namespace tpext {

// Philox4x32-10 (Salmon et al. 2011): ten rounds of
//   (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),  k <- k + (W0, W1)
namespace philox {
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;
}  // namespace philox

// Where in the sequence noise is read. Elements 4 g .. 4 g + 3 of row b come of the four words of Philox at
//   key = (low 32 bits of seed, high 32 bits),  counter = (g, first_row + b, stream, step)
// by two Box-Muller pairs, (words 0, 1) and (words 2, 3):
//   r = sqrt(-2 log u), u = (w + 1) / 2^32 below 1/2 and 1 - (2^32 - 1 - w) / 2^32 = (w + 1) / 2^32 above it
//   r cos(2 pi w' / 2^32), r sin(2 pi w' / 2^32)
struct NoiseCounter {
  uint64_t seed;
  uint32_t step;
  uint32_t stream;
  uint32_t first_row;
};

template <class T>
struct CounterNormal {
  int64_t rows;     // B
  int64_t columns;  // N, elements of a row
  NoiseCounter counter;
  T scale;
  T* output;  // [B, N]
};

}  // namespace tpext
