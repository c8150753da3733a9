// What the kernel of the regularised inverse needs to know: sizes and pointers, shared by every backend.
#pragma once

#include <cstdint>

#include "core/member_number.h"

namespace tpext {

// Without regularisation R W (or W R) is the identity, of trace k = min(M, N). Rounding leaves a singular matrix a Gram
// matrix with a tiny pivot of either sign, so that no threshold on pivots tells it from one that is merely ill
// conditioned. But what has rank k - 1 stays so in a product, whatever the inverse: its trace falls short by one, and
// that of a regular matrix by the relative error of the inverse, which is refused above this.
constexpr double kGreatestLoss = 0.1;

// R = (W'W + reg I)^-1 W' = W'(WW' + reg I)^-1 of each matrix of a batch. Arrays are dense and row-major.
//
// A matrix that has no inverse to working precision harms no other: its own inverse is left as it was, on CUDA filled
// with NaN. There the loss above is for the caller to look at: parts of a matrix are inverted by blocks that do not
// meet.
template <class T>
struct RegularizedInverse {
  enum Status : int64_t {
    ok = 0,
    not_finite = 1,  // the weight has NaN or infinite elements
    singular = 2,    // the Gram matrix is singular to working precision, or overflows
  };

  int64_t batch;
  int64_t rows;         // M
  int64_t columns;      // N
  MemberNumber<T> reg;  // >= 0, of each matrix
  const T* weight;      // [batch, M, N]
  T* inverse;           // [batch, N, M]
  int64_t* status;      // [batch]
};

// X = Y R' = Y W (W'W + reg I)^-1 of each matrix of a batch, that is argmin_x ||W x - y||^2 + reg ||x||^2 for each row
// y of Y, without forming R. Status and failures are those of the inverse.
template <class T>
struct RegularizedSolve {
  int64_t batch;
  int64_t rows;     // M
  int64_t columns;  // N
  int64_t count;    // K
  T reg;            // >= 0
  const T* weight;  // [batch, M, N]
  const T* rhs;     // [batch, K, M]
  T* solution;      // [batch, K, N]
  int64_t* status;  // [batch]
};

}  // namespace tpext
