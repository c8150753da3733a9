// Products of a tile of states with weights that never leave the registers of a block:
//     y[row][column] = sum_k state[row][k] M(k, column)
// for a few batch rows and the block's share of the columns. Two ways, with one interface:
//
//   Multiply    float and double, fused multiply-adds. kDepthLanes lanes of a warp share the depth k; a lane keeps the
//               weights of kLaneColumns columns and its part of the depth, reads that part of each row in 16-byte
//               pieces, and the lanes add up by a reduce-scatter of shuffles, which leaves each output with one lane.
//               Neighbouring lanes read the same piece for different columns: a read of 16 bytes a lane takes two
//               cycles where neighbours share the address, else four.
//   MatrixUnit  16-bit formats, mma.m16n8k16 with float accumulators. The weights are the 16 x 16 operand, eight batch
//               rows the 8 columns of the other. A warp has 16 columns; `kSplit` warps may share their depth.
//
// Every weight is a register of a known number: all loops over them are unrolled. Depth and columns beyond H hold zero
// weights and zero states. Deterministic: the order of a sum depends on the type alone.
//
//   Storage, Compute          type of weights and states in memory; of sums
//   kRows, kDepth, kColumns   the tile: batch rows, depth (>= H), columns of a block
//   kStride                   elements from a row of states to the next
//   kOutputs                  sums that a thread ends up with; output(i) says which, owns() whether they count
//   kScratchBytes             shared memory that products need
//   kCycles                   predicted, of a product by one block
//   load(weight)              weight(k, column) -> Storage, called for every pair that counts
//   Partial                   a thread's part of sums that other threads have parts of
//   accumulate(products, states, partials)   adds the products of one state with several matrices, a partial each;
//                             what is read of the state is read once for all of them
//   add_up(products, scratch, partials, y)   the sums
#pragma once

#include "core/low_precision.h"
#include "cuda/device.h"

namespace tpext::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Place of a sum in the tile.
struct Output {
  int row, column;
};

template <class T, int kDepthLanes, int kLaneColumns, int kPieces, int kTail, int kTileRows>
class Multiply {
 public:
  using Storage = T;
  using Compute = T;
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  static constexpr int kRows = kTileRows;
  static constexpr int kDepth = kDepthLanes * (kPiece * kPieces + kTail);
  static constexpr int kColumns = kThreads / kDepthLanes * kLaneColumns;
  static constexpr int kStride = (kDepth + kPiece - 1) / kPiece * kPiece;
  static constexpr int kSums = kRows * kLaneColumns;
  static constexpr int kOutputs = kSums > kDepthLanes ? kSums / kDepthLanes : 1;
  static constexpr int kScratchBytes = 0;
  // Of the multiply-adds, or of the reads of states: whichever take longer.
  static constexpr int kRate = sizeof(T) == 8 ? 64 : 128;
  static constexpr int kReadCycles = kWarps * kRows * (2 * kPieces + kTail);
  static constexpr int kMultiplyCycles = kRows * kDepth * kColumns / kRate;
  static constexpr int kCycles = kReadCycles > kMultiplyCycles ? kReadCycles : kMultiplyCycles;
  static_assert((kSums & (kSums - 1)) == 0 && kTail <= 1);

  // Of the lanes of a warp, those with the same depth are neighbours and have columns of their own.
  static constexpr int kNeighbours = kWarp / kDepthLanes;
  TPEXT_HOST_DEVICE static constexpr int depth_lane(int thread) { return thread % kWarp / kNeighbours; }
  TPEXT_HOST_DEVICE static constexpr int first_column(int thread) {
    return (thread / kWarp * kNeighbours + thread % kNeighbours) * kLaneColumns;
  }

  // Depth of a lane's weight number `index`.
  TPEXT_HOST_DEVICE static constexpr int depth(int depth_lane, int index) {
    return index < kPiece * kPieces ? (index / kPiece * kDepthLanes + depth_lane) * kPiece + index % kPiece
                                    : kDepthLanes * kPiece * kPieces + depth_lane;
  }
  TPEXT_HOST_DEVICE static constexpr Output output(int thread, int index) {
    const int lane = depth_lane(thread);
    int first = 0;
    for (int mask = kDepthLanes / 2, count = kSums; mask > 0 && count > 1; mask /= 2) {
      count /= 2;
      if ((lane & mask) != 0) first += count;
    }
    const int sum = first + index;
    return {sum / kLaneColumns, first_column(thread) + sum % kLaneColumns};
  }
  // Where there are fewer sums than lanes, several lanes hold the same.
  TPEXT_HOST_DEVICE static constexpr bool owns(int thread) {
    return kSums >= kDepthLanes || depth_lane(thread) % (kDepthLanes / kSums) == 0;
  }

  template <class Weight>
  __device__ void load(const Weight& weight) {
    const int lane = depth_lane(thread_index()), column = first_column(thread_index());
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
#pragma unroll
      for (int i = 0; i < kWeights; ++i) weights_[c][i] = weight(depth(lane, i), column + c);
  }

  struct Partial {
    T sums[kSums];
  };

  template <int kCount>
  __device__ static void accumulate(const Multiply* products, const T* states, Partial (&partials)[kCount]) {
    const int lane = depth_lane(thread_index());
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Piece piece = *reinterpret_cast<const Piece*>(states + r * kStride + depth(lane, i * kPiece));
#pragma unroll
        for (int p = 0; p < kCount; ++p)
#pragma unroll
          for (int k = 0; k < kPiece; ++k)
#pragma unroll
            for (int c = 0; c < kLaneColumns; ++c)
              partials[p].sums[r * kLaneColumns + c] += piece.values[k] * products[p].weights_[c][i * kPiece + k];
      }
    if constexpr (kTail == 1) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const T value = states[r * kStride + depth(lane, kWeights - 1)];
#pragma unroll
        for (int p = 0; p < kCount; ++p)
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c)
            partials[p].sums[r * kLaneColumns + c] += value * products[p].weights_[c][kWeights - 1];
      }
    }
  }

  template <int kCount>
  __device__ static void add_up(Multiply*, char*, Partial (&partials)[kCount], T (*y)[kOutputs]) {
    const int lane = depth_lane(thread_index());
#pragma unroll
    for (int p = 0; p < kCount; ++p) {
      exchange<kSums, kDepthLanes / 2>(partials[p].sums, lane);
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) y[p][i] = partials[p].sums[i];
    }
  }

 private:
  static constexpr int kWeights = kPiece * kPieces + kTail;
  struct alignas(16) Piece {
    T values[kPiece];
  };

  // Halves the number of sums with each exchange, until there is one a lane; then all lanes add the same.
  template <int kCount, int kMask>
  __device__ static void exchange(T (&sums)[kSums], int lane) {
    if constexpr (kMask > 0) {
      if constexpr (kCount > 1) {
        const bool upper = (lane & kMask) != 0;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
          const T given = upper ? sums[i] : sums[i + kCount / 2], kept = upper ? sums[i + kCount / 2] : sums[i];
          sums[i] = kept + shuffle_xor(given, kMask * kNeighbours);
        }
        exchange<kCount / 2, kMask / 2>(sums, lane);
      } else {
        sums[0] += shuffle_xor(sums[0], kMask * kNeighbours);
        exchange<1, kMask / 2>(sums, lane);
      }
    }
  }

  T weights_[kLaneColumns][kWeights];
};

template <class T, int kTileDepth, int kSplit>
class MatrixUnit {
 public:
  using Storage = T;
  using Compute = float;
  static constexpr int kRows = 8;
  static constexpr int kDepth = kTileDepth;
  static constexpr int kColumns = kWarps / kSplit * 16;
  // A quarter warp's 16-byte reads are of two rows: 64 bytes more than a multiple of 128 keep them apart.
  static constexpr int kStride = kDepth + 32;
  static constexpr int kOutputs = kSplit < 4 ? 4 / kSplit : 1;
  // Two buffers, used in turns, so that one barrier a product is enough.
  static constexpr int kScratchBytes = kSplit == 1 ? 0 : 2 * kThreads * 16;
  // Of reading the states, four cycles a 16-byte read of a warp; the matrix units take less.
  static constexpr int kCycles = kWarps * kDepth / 32 / kSplit * 4;
  static_assert(kDepth % (32 * kSplit) == 0);

  // Lanes take eight neighbouring k at a time, 16 bytes, for two instructions. Which k stands where in an instruction
  // is free as long as both operands agree: register `half` of instruction i has two, from this one on.
  TPEXT_HOST_DEVICE static constexpr int depth(int thread, int i, int half) {
    const int warp = thread / kWarp, q = thread % 4;
    return warp % kSplit * (kDepth / kSplit) + i / 2 * 32 + q * 8 + i % 2 * 4 + half * 2;
  }
  TPEXT_HOST_DEVICE static constexpr Output output(int thread, int index) {
    const int warp = thread / kWarp, lane = thread % kWarp, c = (warp % kSplit * kOutputs + index) % 4;
    return {lane % 4 * 2 + c % 2, warp / kSplit * 16 + lane / 4 + c / 2 * 8};
  }
  // Of eight warps that share a sum four end up with it.
  TPEXT_HOST_DEVICE static constexpr bool owns(int thread) { return thread / kWarp % kSplit * kOutputs < 4; }

  template <class Weight>
  __device__ void load(const Weight& weight) {
    const int thread = thread_index(), column = thread / kWarp / kSplit * 16 + thread % kWarp / 4;
#pragma unroll
    for (int i = 0; i < kInstructions; ++i)
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int k = depth(thread, i, part / 2), n = column + part % 2 * 8;
        weights_[i][part] = weight(k, n).bits | static_cast<uint32_t>(weight(k + 1, n).bits) << 16;
      }
  }

  // An instruction waits for its own accumulator: so two stand side by side, where the products themselves are few.
  struct Partial {
    float sums[2][4];
  };
  TPEXT_HOST_DEVICE static constexpr int chains(int products) { return products < 3 ? 2 : 1; }

  template <int kCount>
  __device__ static void accumulate(const MatrixUnit* products, const T* states, Partial (&partials)[kCount]) {
    const int thread = thread_index();
    const T* const row = states + thread % kWarp / 4 * kStride;
#pragma unroll
    for (int i = 0; i < kInstructions; i += 2) {
      const Piece piece = *reinterpret_cast<const Piece*>(row + depth(thread, i, 0));
#pragma unroll
      for (int p = 0; p < kCount; ++p) {
        mma(partials[p].sums[0], products[p].weights_[i], piece.pairs[0], T());
        mma(partials[p].sums[chains(kCount) - 1], products[p].weights_[i + 1], piece.pairs[1], T());
      }
    }
  }

  template <int kCount>
  __device__ static void add_up(MatrixUnit* products, char* scratch, Partial (&partials)[kCount],
                                float (*y)[kOutputs]) {
    if constexpr (chains(kCount) == 2) {
#pragma unroll
      for (int p = 0; p < kCount; ++p)
#pragma unroll
        for (int c = 0; c < 4; ++c) partials[p].sums[0][c] += partials[p].sums[1][c];
    }
    if constexpr (kSplit == 1) {
#pragma unroll
      for (int p = 0; p < kCount; ++p)
#pragma unroll
        for (int c = 0; c < kOutputs; ++c) y[p][c] = partials[p].sums[0][c];
    } else {
      const int thread = thread_index(), part = thread / kWarp % kSplit;
      float* const buffer = reinterpret_cast<float*>(scratch) + products->turn_ * kThreads * 4;
      products->turn_ ^= 1;
      constexpr int kNext = kScratchBytes / static_cast<int>(sizeof(float));
#pragma unroll
      for (int p = 0; p < kCount; ++p)
#pragma unroll
        for (int c = 0; c < 4; ++c) buffer[p * kNext + c * kThreads + thread] = partials[p].sums[0][c];
      block_barrier();
#pragma unroll
      for (int p = 0; p < kCount; ++p)
#pragma unroll
        for (int c = 0; c < kOutputs; ++c) {
          const float* const at = buffer + p * kNext + (part * kOutputs + c) % 4 * kThreads + thread - part * kWarp;
          y[p][c] = at[0];
#pragma unroll
          for (int other = 1; other < kSplit; ++other) y[p][c] += at[other * kWarp];
        }
    }
  }

 private:
  static constexpr int kInstructions = kDepth / 16 / kSplit;
  struct alignas(16) Piece {
    uint32_t pairs[2][2];
  };

  uint32_t weights_[kInstructions][4];
  int turn_ = 0;
};

}  // namespace tpext::cuda
