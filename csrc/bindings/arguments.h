// From Python arguments to validated pointers: every entry of `_C` reads its tensors through this, so that nothing but
// a readable error can come of a wrong dtype, device, size or stride.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"

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

  bool given() const { return managed_ != nullptr; }
  int64_t rank() const { return tensor().rank; }
  int64_t size(int64_t axis) const { return tensor().shape[axis]; }
  dlpack::DataType dtype() const { return tensor().dtype; }

  void require() const;
  void require_rank(const std::vector<const char*>& symbols) const;
  void require_shape(const std::vector<Dim>& dims) const;
  // Dense, row-major, on the CPU, of this dtype.
  void require_dense(dlpack::DataType dtype) const;
  // On the CPU, of this dtype, dense along the last axis.
  void require_dense_rows(dlpack::DataType dtype) const;
  // Elements from one index of an axis to the next.
  int64_t stride(int64_t axis) const;
  // Asks the system to back a large output with huge pages where it offers them: the first touch of 4 KiB pages can
  // take longer than the computation. Changes no content.
  void prefer_huge_pages() const;

  template <class T>
  T* data() const {
    return given() ? reinterpret_cast<T*>(static_cast<char*>(tensor().data) + tensor().byte_offset) : nullptr;
  }

 private:
  const dlpack::Tensor& tensor() const { return managed_->tensor; }
  bool require_readable(dlpack::DataType dtype) const;
  std::string shape_text() const;
  std::string label() const { return std::string(op_) + ": " + name_; }

  const char* op_;
  const char* name_;
  py::object capsule_;
  dlpack::ManagedTensor* managed_ = nullptr;
};

// One of `choices` as its index, or an error that lists them.
int choose(const char* op, const char* name, const std::string& value, const std::vector<const char*>& choices);

std::string dtype_name(dlpack::DataType dtype);

}  // namespace tpext::bindings
