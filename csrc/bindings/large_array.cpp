#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/entries.h"
#include "cpu/large_memory.h"

namespace tpext::bindings {

namespace {

struct LargeArray {
  dlpack::ManagedTensor managed;
  std::vector<int64_t> shape;
  cpu::LargeMemory memory;
};

// The capsule is the array's owner until someone makes a tensor of it and renames it.
void destroy(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  auto* const managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

py::object large_array(const std::vector<int64_t>& shape, int bits) {
  if (bits != 32 && bits != 64)
    throw py::value_error("large_array: bits must be 32 or 64, got " + std::to_string(bits));
  size_t bytes = static_cast<size_t>(bits) / 8;
  for (const int64_t size : shape) {
    if (size < 0) throw py::value_error("large_array: shape must have no negative size, got " + std::to_string(size));
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) return py::none();
  }
  auto array = std::make_unique<LargeArray>(LargeArray{{}, shape, {}});
  array->memory = cpu::take_large(bytes);
  if (array->memory.data == nullptr) return py::none();
  array->managed.tensor = {array->memory.data,
                           {dlpack::kCpu, 0},
                           static_cast<int32_t>(shape.size()),
                           {dlpack::kFloat, static_cast<uint8_t>(bits), 1},
                           array->shape.data(),
                           nullptr,
                           0};
  array->managed.context = array.get();
  array->managed.deleter = [](dlpack::ManagedTensor* managed) {
    auto* const own = static_cast<LargeArray*>(managed->context);
    cpu::give_back_large(own->memory);
    delete own;
  };
  PyObject* const capsule = PyCapsule_New(&array->managed, "dltensor", destroy);
  if (capsule == nullptr) {
    cpu::give_back_large(array->memory);
    throw py::error_already_set();
  }
  (void)array.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

void define_large_array(py::module_& m) { m.def("large_array", &large_array, py::arg("shape"), py::arg("bits")); }

}  // namespace tpext::bindings
