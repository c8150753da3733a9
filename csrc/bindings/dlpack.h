// The binary interface of DLPack 0.x/1.x ("dltensor" capsules, https://dmlc.github.io/dlpack): what is needed to read
// one.
#pragma once

#include <cstdint>

namespace tpext::dlpack {

struct Device {
  int32_t type;  // 1: CPU
  int32_t id;
};

struct DataType {
  uint8_t code;  // 0: signed integer, 2: IEEE floating point
  uint8_t bits;
  uint16_t lanes;
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

constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2;

}  // namespace tpext::dlpack
