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

// Conversions between storage and compute type: exact to the compute type, rounded to nearest even from it. Every NaN
// becomes the devices' 0x7fff.
template <class T>
TPEXT_HOST_DEVICE inline Compute<T> to_compute(T value) {
  return value;
}
template <>
TPEXT_HOST_DEVICE inline float to_compute(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
template <>
TPEXT_HOST_DEVICE inline float to_compute(Float16 value) {
  float result;
#ifdef __CUDA_ARCH__
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude > 0x7c00u) {
    bits = 0x7fffffffu;
  } else if (magnitude == 0x7c00u) {
    bits = sign | 0x7f800000u;
  } else if (magnitude >= 0x0400u) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &subnormal, sizeof(bits));
    bits |= sign;
  }
  std::memcpy(&result, &bits, sizeof(result));
#endif
  return result;
}

template <class T>
TPEXT_HOST_DEVICE inline T from_compute(Compute<T> value) {
  return value;
}
template <>
TPEXT_HOST_DEVICE inline Bfloat16 from_compute<Bfloat16>(float value) {
  Bfloat16 result;
#ifdef __CUDA_ARCH__
  // The conversion of a pair runs at full speed on sm_80, that of a single value does not.
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
  result.bits = static_cast<uint16_t>(pair);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  result.bits = nan ? 0x7fffu : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
  return result;
}
template <>
TPEXT_HOST_DEVICE inline Float16 from_compute<Float16>(float value) {
  Float16 result;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    result.bits = 0x7fffu;
    return result;
  }
  if (magnitude >= 0x477ff000u) {  // 65520, half-way to the power of two that is out of range
    rounded = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal
    const uint32_t rebiased = magnitude - (112u << 23);
    rounded = (rebiased + 0x0fffu + ((rebiased >> 13) & 1u)) >> 13;
  } else if (magnitude <= 0x33000000u) {  // 2^-25, half of the smallest subnormal
    rounded = 0;
  } else {
    const uint32_t significand = (magnitude & 0x007fffffu) | 0x00800000u, shift = 126u - (magnitude >> 23);
    const uint32_t rest = significand & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    rounded = significand >> shift;
    rounded += rest > half || (rest == half && (rounded & 1u)) ? 1u : 0u;
  }
  result.bits = static_cast<uint16_t>(sign | rounded);
#endif
  return result;
}

}  // namespace tpext
