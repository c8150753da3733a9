// The binary interface of DLPack 0.x/1.x ("dltensor" capsules, https://dmlc.github.io/dlpack): what is needed to read
// one.
#pragma once

#include <cstdint>

namespace tpext::dlpack {

struct Device {
  int32_t type;
  int32_t id;

  bool operator==(const Device&) const = default;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;

  bool operator==(const DataType&) const = default;
};

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: dense, row-major
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

// Device types. Pinned and managed memory are those of CUDA that the CPU can read as well.
constexpr int32_t kCpu = 1, kCuda = 2, kCudaPinned = 3, kCudaManaged = 13;

constexpr uint8_t kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4;
constexpr DataType kFloat32{kFloat, 32, 1}, kFloat64{kFloat, 64, 1}, kFloat16{kFloat, 16, 1}, kBfloat16{kBfloat, 16, 1},
    kInt64{kInt, 64, 1}, kUint8{kUint, 8, 1};

}  // namespace tpext::dlpack
