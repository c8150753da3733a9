#include "bindings/call.h"

#include <cstring>

namespace tpext::bindings {

namespace {

dlpack::DataType precision(const Argument& leading) {
  leading.require();
  return leading.dtype() == dlpack::kFloat64 ? dlpack::kFloat64 : dlpack::kFloat32;
}

}  // namespace

KernelCall::KernelCall(const char* op, const Argument& leading, const py::object& execution)
    : op_(op), leading_(leading), dtype_(precision(leading)) {
  execution_.emplace(op, leading, execution);
  threads_ = execution_->threads();
}

KernelCall::KernelCall(const char* op, const Argument& leading)
    : op_(op), leading_(leading), dtype_(precision(leading)) {
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

void KernelCall::written(const Argument& argument, const char* dims) {
  check(argument, dims, dtype_);
  if (!on_cuda()) argument.prefer_huge_pages();
}

void KernelCall::written(const Argument& argument) const {
  floats(argument);
  if (!on_cuda()) argument.prefer_huge_pages();
}

}  // namespace tpext::bindings
