#include "bindings/arguments.h"

#include <algorithm>

#include "cpu/large_memory.h"

namespace tpext::bindings {

namespace {
constexpr const char* kUnread = "dltensor";
constexpr const char* kRead = "used_dltensor";
constexpr int64_t kMostBytes = int64_t{1} << 48;
}  // namespace

std::string dtype_name(dlpack::DataType dtype) {
  static const char* const codes[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  const std::string code = dtype.code < 7 ? codes[dtype.code] : "code " + std::to_string(dtype.code) + ", ";
  return code + (dtype.code == 6 ? "" : std::to_string(dtype.bits)) +
         (dtype.lanes == 1 ? "" : "x" + std::to_string(dtype.lanes));
}

std::string device_name(dlpack::Device device) {
  const std::string type = std::to_string(device.type);
  switch (device.type) {
    case dlpack::kCpu: return "the CPU";
    case dlpack::kCuda: return "CUDA device " + std::to_string(device.id);
    case dlpack::kCudaPinned: return "pinned memory of CUDA (DLPack device type " + type + ")";
    case dlpack::kCudaManaged: return "managed memory of CUDA (DLPack device type " + type + ")";
    default: return "DLPack device type " + type;
  }
}

Argument::Argument(const char* op, const char* name, const py::object& value) : op_(op), name_(name) {
  if (value.is_none()) return;
  py::object capsule = value;
  if (!PyCapsule_CheckExact(capsule.ptr())) {
    if (!py::hasattr(value, "__dlpack__"))
      throw py::type_error(label() + " must be a DLPack capsule or an object with __dlpack__, got " +
                           std::string(py::str(py::type::handle_of(value).attr("__name__"))));
    try {
      capsule = value.attr("__dlpack__")();
    } catch (py::error_already_set& error) {
      py::raise_from(error, PyExc_ValueError, (label() + " must be a tensor that DLPack can export").c_str());
      throw py::error_already_set();
    }
  }
  if (PyCapsule_IsValid(capsule.ptr(), kRead))
    throw py::value_error(label() + " must be a fresh DLPack capsule, got one that was consumed before");
  if (!PyCapsule_IsValid(capsule.ptr(), kUnread))
    throw py::type_error(label() + " must be a DLPack capsule named \"dltensor\", got another capsule");
  managed_ = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kUnread));
  // From here on the tensor is ours to delete, and the capsule must say so.
  PyCapsule_SetName(capsule.ptr(), kRead);
  capsule_ = std::move(capsule);
}

Argument::~Argument() {
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
}

std::string Argument::shape_text() const {
  std::string text = "[";
  for (int64_t i = 0; i < rank(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(size(i));
  return text + "]";
}

void Argument::require() const {
  if (!given()) throw py::type_error(label() + " must be a tensor, got None");
}

void Argument::require_rank(std::span<const char* const> symbols) const {
  require();
  if (rank() == static_cast<int64_t>(symbols.size())) return;
  std::string expected = "[";
  for (size_t i = 0; i < symbols.size(); ++i) expected += std::string(i == 0 ? "" : ", ") + symbols[i];
  throw py::value_error(label() + " must be " + expected + "], got " + shape_text());
}

void Argument::require_shape(std::span<const Dim> dims) const {
  require();
  bool right = rank() == static_cast<int64_t>(dims.size());
  for (size_t i = 0; right && i < dims.size(); ++i) right = size(static_cast<int64_t>(i)) == dims[i].size;
  if (right) return;
  std::string expected = "[";
  for (size_t i = 0; i < dims.size(); ++i)
    expected += std::string(i == 0 ? "" : ", ") + dims[i].symbol + "=" + std::to_string(dims[i].size);
  throw py::value_error(label() + " must be " + expected + "], got " + shape_text());
}

// Checks device, dtype and memory; returns whether the tensor is empty.
bool Argument::require_readable(dlpack::DataType dtype, const Argument& leading) const {
  require();
  if (device() != leading.device())
    throw py::value_error(label() + " must be on " + device_name(leading.device()) + " as " + leading.name() +
                          " is, got " + device_name(device()));
  if (tensor().dtype != dtype)
    throw py::value_error(label() + " must be " + dtype_name(dtype) + ", got " + dtype_name(tensor().dtype));
  if (std::any_of(tensor().shape, tensor().shape + rank(), [](int64_t n) { return n < 0; }))
    throw py::value_error(label() + " must have sizes >= 0, got " + shape_text());
  // More than any memory has: no product of some sizes of a call overflows, nor where others are 0.
  int64_t bytes = 8;
  for (int64_t i = 0; i < rank(); ++i)
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(size(i), 1), &bytes) || bytes > kMostBytes)
      throw py::value_error(label() + " must have sizes for at most 2^48 bytes, got " + shape_text());
  const bool empty = std::any_of(tensor().shape, tensor().shape + rank(), [](int64_t n) { return n == 0; });
  if (tensor().data == nullptr && !empty)
    throw py::value_error(label() + " must have memory, got a null pointer (a fake tensor, or storage that was freed)");
  if (!empty && (reinterpret_cast<uintptr_t>(tensor().data) + tensor().byte_offset) % (dtype.bits / 8) != 0)
    throw py::value_error(label() +
                          " must have its elements at multiples of their size in memory, got another address");
  return empty;
}

void Argument::require_dense(dlpack::DataType dtype, const Argument& leading) const {
  if (require_readable(dtype, leading) || tensor().strides == nullptr) return;
  int64_t expected = 1;
  for (int64_t i = rank() - 1; i >= 0; --i) {
    if (size(i) != 1 && tensor().strides[i] != expected)
      throw py::value_error(label() + " must be contiguous, got strides that skip or repeat elements at axis " +
                            std::to_string(i) + " of " + shape_text());
    expected *= size(i);
  }
}

void Argument::require_dense_rows(dlpack::DataType dtype, const Argument& leading) const {
  if (require_readable(dtype, leading)) return;
  const int64_t last = rank() - 1;
  if (last >= 0 && size(last) != 1 && stride(last) != 1)
    throw py::value_error(label() + " must be contiguous along its last axis, got stride " +
                          std::to_string(stride(last)));
}

int64_t Argument::stride(int64_t axis) const {
  if (tensor().strides != nullptr) return tensor().strides[axis];
  int64_t stride = 1;
  for (int64_t i = rank() - 1; i > axis; --i) stride *= size(i);
  return stride;
}

void Argument::prefer_huge_pages() const {
  size_t bytes = tensor().dtype.bits / 8;
  for (int64_t i = 0; i < rank(); ++i) bytes *= static_cast<size_t>(size(i));
  cpu::prefer_huge_pages(data<char>(), bytes);
}

int choose(const char* op, const char* name, const std::string& value, const std::vector<const char*>& choices) {
  std::string expected;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (value == choices[i]) return static_cast<int>(i);
    expected += std::string(i == 0 ? "'" : ", '") + choices[i] + "'";
  }
  throw py::value_error(std::string(op) + ": " + name + " must be one of " + expected + ", got '" + value + "'");
}

}  // namespace tpext::bindings
