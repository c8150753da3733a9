// From Python arguments to validated pointers: every entry of `_C` reads its tensors through this, so that nothing but
// a readable error can come of a wrong dtype, device, size or stride.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "core/member_number.h"

namespace tpext::bindings {

namespace py = pybind11;

// A size with the symbol that error messages give it.
struct Dim {
  const char* symbol;
  int64_t size;
};

// One argument that a capsule named "dltensor" stands for, or an object with `__dlpack__`; held until the call ends.
class Argument {
 public:
  Argument(const char* op, const char* name, const py::object& value);
  ~Argument();
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;

  const char* name() const { return name_; }
  bool given() const { return managed_ != nullptr; }
  int64_t rank() const { return tensor().rank; }
  int64_t size(int64_t axis) const { return tensor().shape[axis]; }
  dlpack::DataType dtype() const { return tensor().dtype; }
  dlpack::Device device() const { return tensor().device; }

  void require() const;
  void require_rank(std::span<const char* const> symbols) const;
  void require_rank(std::initializer_list<const char*> symbols) const { require_rank(std::span(symbols)); }
  void require_shape(std::span<const Dim> dims) const;
  void require_shape(std::initializer_list<Dim> dims) const { require_shape(std::span(dims)); }
  // Dense, row-major, of this dtype, on the device of the call's leading tensor.
  void require_dense(dlpack::DataType dtype, const Argument& leading) const;
  // The same, dense along the last axis alone.
  void require_dense_rows(dlpack::DataType dtype, const Argument& leading) const;
  // Elements from one index of an axis to the next.
  int64_t stride(int64_t axis) const;
  // How errors begin, and the shape as they give it.
  std::string label() const { return std::string(op_) + ": " + name_; }
  std::string shape_text() const;
  // Asks the system to back a large output with huge pages where it offers them: the first touch of 4 KiB pages can
  // take longer than the computation. Changes no content. For memory of the CPU.
  void prefer_huge_pages() const;

  template <class T>
  T* data() const {
    return given() ? reinterpret_cast<T*>(static_cast<char*>(tensor().data) + tensor().byte_offset) : nullptr;
  }

 private:
  const dlpack::Tensor& tensor() const { return managed_->tensor; }
  bool require_readable(dlpack::DataType dtype, const Argument& leading) const;

  const char* op_;
  const char* name_;
  py::object capsule_;
  dlpack::ManagedTensor* managed_ = nullptr;
};

// A number for all members of a stack or one for each, of the precision that a kernel wants; held until the call ends.
class Numbers {
 public:
  Numbers(const char* name, const std::vector<double>& values)
      : name_(name), doubles_(values), floats_(values.begin(), values.end()) {}

  const char* name() const { return name_; }
  const std::vector<double>& values() const { return doubles_; }
  int64_t count() const { return static_cast<int64_t>(doubles_.size()); }

  template <class T>
  MemberNumber<T> as() const {
    if constexpr (sizeof(T) == sizeof(double))
      return {doubles_.data(), count()};
    else
      return {floats_.data(), count()};
  }

 private:
  const char* name_;
  std::vector<double> doubles_;
  std::vector<float> floats_;
};

// One of `choices` as its index, or an error that lists them.
int choose(const char* op, const char* name, const std::string& value, const std::vector<const char*>& choices);

// Names for errors: "bfloat16"; "the CPU", "CUDA device 0".
std::string dtype_name(dlpack::DataType dtype);
std::string device_name(dlpack::Device device);

}  // namespace tpext::bindings
