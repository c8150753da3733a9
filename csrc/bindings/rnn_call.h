// What the entries of recurrent layers share: the sizes of a call, its input, its choices.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "bindings/call.h"
#include "core/rnn.h"

namespace tpext::bindings {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// A call whose leading argument is [S, T, B, H].
class RnnCall : public KernelCall {
 public:
  RnnCall(const char* op, const Argument& leading, const Argument& lengths, const std::vector<bool>& reverse,
          const py::object& execution)
      : KernelCall(op, leading, execution, Storage::any), reverse_(reverse.begin(), reverse.end()) {
    floats(leading, "STBH");
    if (on_cuda() && !countable())
      throw py::value_error(leading.label() + " must have S, T and B * H below 2^31 on CUDA, got " +
                            leading.shape_text());
    if (static_cast<int64_t>(reverse.size()) != size('S'))
      refuse("reverse must have S=" + std::to_string(size('S')) + " values, got " + std::to_string(reverse.size()));
    if (lengths.given()) integers(lengths, "B");
    sizes_ = {size('S'), size('T'), size('B'), size('H'), lengths.data<const int64_t>(), reverse_.data()};
  }

  const RnnSizes& sizes() const { return sizes_; }

  void numbers(const Numbers& numbers) const { KernelCall::numbers(numbers, *find('S')); }

  // [S or 1, T, B, I] with any strides but that of I.
  void input(const Argument& argument) {
    argument.require_rank({"S or 1", "T", "B", "I"});
    set('I', argument.size(3));
    argument.require_shape({argument.size(0) == 1 ? Dim{"S or 1", 1} : *find('S'), *find('T'), *find('B'), *find('I')});
    rows(argument);
  }

 private:
  // What the CUDA kernels count with 32 bits.
  bool countable() const {
    return size('S') <= kMaxInt && size('T') <= kMaxInt && size('B') <= kMaxInt / std::max<int64_t>(size('H'), 1);
  }

  const std::vector<uint8_t> reverse_;
  RnnSizes sizes_;
};

template <class T>
RnnInput<T> input_of(const Argument& input) {
  if (!input.given()) return {};
  return {input.data<const T>(), input.size(3), input.size(0) == 1 ? 0 : input.stride(0), input.stride(1),
          input.stride(2)};
}

// What a scan of these sizes runs as on a CUDA device: the regime, the bytes of zeroed workspace, predicted cycles.
// plan(T(), wanted) of the storage type. In a build with CUDA.
template <class Plan>
py::tuple planned(const char* op, const std::string& dtype, int64_t stack, int64_t batch, int64_t hidden, int device,
                  const std::string& regime, const Plan& plan) {
  const std::vector<const char*> names = {"float32", "float64", "bfloat16", "float16"};
  constexpr dlpack::DataType types[] = {dlpack::kFloat32, dlpack::kFloat64, dlpack::kBfloat16, dlpack::kFloat16};
  const dlpack::DataType type = types[choose(op, "dtype", dtype, names)];
  for (const Dim& size : {Dim{"stack", stack}, Dim{"batch", batch}, Dim{"hidden", hidden}})
    if (size.size < 0 || size.size > kMaxInt)
      throw py::value_error(std::string(op) + ": " + size.symbol + " must lie in 0..2^31-1, got " +
                            std::to_string(size.size));
  if (batch * hidden > kMaxInt)
    throw py::value_error(std::string(op) + ": batch * hidden must be below 2^31, got " + std::to_string(batch) +
                          " * " + std::to_string(hidden));
  if (device < 0) throw py::value_error(std::string(op) + ": device must be >= 0, got " + std::to_string(device));
  const auto wanted = static_cast<cuda::Regime>(choose(op, "regime", regime, kRegimes));
  const cuda::RnnPlan found = with_storage_type(type, [&](auto storage) { return plan(storage, wanted); });
  return py::make_tuple(kRegimes[static_cast<size_t>(found.regime)], found.workspace_bytes, found.cycles);
}

inline Slope read_slope(const KernelCall& call, const std::string& value, const char* name = "slope") {
  return static_cast<Slope>(choose(call.op(), name, value, {"inverse", "derivative", "one"}));
}

inline bool read_credit(const KernelCall& call, const std::string& name) {
  return choose(call.op(), "credit", name, {"local", "through_time"}) == 1;
}

}  // namespace tpext::bindings
