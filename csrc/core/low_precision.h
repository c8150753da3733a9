// The 16-bit floating-point formats as they lie in memory; everything computes in float.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TPEXT_HOST_DEVICE __host__ __device__
#else
#define TPEXT_HOST_DEVICE
#endif

namespace tpext {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which elements of a storage type are computed.
template <class T>
struct ComputeType {
  using type = T;
};
template <>
struct ComputeType<Bfloat16> {
  using type = float;
};
template <>
struct ComputeType<Float16> {
  using type = float;
};
template <class T>
using Compute = typename ComputeType<T>::type;

}  // namespace tpext
