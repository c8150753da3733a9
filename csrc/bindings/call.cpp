#include "bindings/call.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace tpext::bindings {

namespace {

// The dtype that all tensors must have: the leading one's if a kernel takes it.
dlpack::DataType precision(const Argument& leading, bool low) {
  leading.require();
  const dlpack::DataType dtype = leading.dtype();
  const bool is_low = dtype == dlpack::kBfloat16 || dtype == dlpack::kFloat16;
  return dtype == dlpack::kFloat64 || (low && is_low) ? dtype : dlpack::kFloat32;
}

}  // namespace

KernelCall::KernelCall(const char* op, const Argument& leading, const py::object& execution, Storage storage)
    : op_(op),
      leading_(leading),
      execution_(std::in_place, op, leading, execution),
      dtype_(precision(leading, storage == Storage::any && on_cuda())),
      threads_(execution_->threads()) {}

KernelCall::KernelCall(const char* op, const Argument& leading)
    : op_(op), leading_(leading), dtype_(precision(leading, false)) {
  if (leading.device().type != dlpack::kCpu)
    throw py::value_error(leading.label() + " must be on the CPU, got " + device_name(leading.device()));
}

KernelCall::KernelCall(const char* op, const Argument& leading, const char* threads, const py::object& value)
    : KernelCall(op, leading) {
  threads_ = threads_of(op, threads, value);
}

const Dim* KernelCall::find(char letter) const {
  for (int i = 0; i < known_; ++i)
    if (letters_[i][0] == letter) return &dims_[i];
  return nullptr;
}

void KernelCall::set(char letter, int64_t size) {
  if (known_ == kMostLetters) throw std::length_error("KernelCall: too many letters");
  letters_[known_][0] = letter;
  letters_[known_][1] = '\0';
  dims_[known_] = {letters_[known_], size};
  ++known_;
}

void KernelCall::check(const Argument& argument, const char* dims, dlpack::DataType dtype) {
  argument.require();
  const int rank = static_cast<int>(std::strlen(dims));
  const bool right = argument.rank() == rank;
  char letters[kMostLetters][2] = {};
  const char* symbols[kMostLetters] = {};
  Dim expected[kMostLetters] = {};
  bool all_known = true;
  for (int i = 0; i < rank; ++i) {
    letters[i][0] = dims[i];
    symbols[i] = letters[i];
    if (right && find(dims[i]) == nullptr) set(dims[i], argument.size(i));
    const Dim* const known = find(dims[i]);
    if (known != nullptr)
      expected[i] = *known;
    else
      all_known = false;
  }
  if (!all_known) argument.require_rank({symbols, static_cast<size_t>(rank)});
  argument.require_shape({expected, static_cast<size_t>(rank)});
  argument.require_dense(dtype, leading_);
}

void KernelCall::none_on_cuda(const Argument& argument) const {
  if (on_cuda() && argument.given()) throw py::value_error(argument.label() + " must be None on CUDA, got a tensor");
}

void KernelCall::none_on_cpu(const Argument& argument) const {
  if (!on_cuda() && argument.given())
    throw py::value_error(argument.label() + " must be None on the CPU, got a tensor");
}

void KernelCall::number(const char* name, double value) const {
  constexpr double kMost = std::numeric_limits<float>::max();
  // the kernel of a 16-bit dtype computes in float32 too
  if (dtype_ == dlpack::kFloat64 || !std::isfinite(value) || std::fabs(value) <= kMost) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  refuse(std::string(name) + " must be within the range of float32, got " + text);
}

void KernelCall::numbers(const Numbers& numbers, const Dim& members) const {
  for (const double value : numbers.values()) number(numbers.name(), value);
  if (numbers.count() == 1 || (numbers.count() == members.size && !on_cuda())) return;
  const std::string or_each =
      on_cuda() ? " value on CUDA"
                : std::string(" or ") + members.symbol + "=" + std::to_string(members.size) + " values";
  refuse(std::string(numbers.name()) + " must have 1" + or_each + ", got " + std::to_string(numbers.count()));
}

void KernelCall::written(const Argument& argument, const char* dims) {
  check(argument, dims, dtype_);
  if (!on_cuda()) argument.prefer_huge_pages();
}

void KernelCall::written(const Argument& argument) const {
  floats(argument);
  if (!on_cuda()) argument.prefer_huge_pages();
}

}  // namespace tpext::bindings
