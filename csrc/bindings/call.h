// One call of an entry of `_C`: its arguments under their names, its tensors against the sizes that they share, and the
// kernel on the device where they are. What an entry takes is said twice: by the parameters of its function, and by
// their names in define().
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "bindings/arguments.h"
#include "bindings/execution.h"
#include "cpu/kernels.h"

namespace tpext::bindings {

// What a kernel on CUDA takes besides float32 and float64: nothing, or what it can store, bfloat16 and float16 as well.
enum class Storage { full, any };

// Sizes, precision and device are those of the leading tensor. Dims are a letter an axis: the first tensor with a
// letter says what it stands for, the others must agree.
class KernelCall {
 public:
  // Runs as `execution` says; or on the CPU alone, on one thread or on a number of them that errors call `threads`.
  KernelCall(const char* op, const Argument& leading, const py::object& execution, Storage storage = Storage::full);
  KernelCall(const char* op, const Argument& leading);
  KernelCall(const char* op, const Argument& leading, const char* threads, const py::object& value);

  const char* op() const { return op_; }
  bool on_cuda() const { return execution_ && execution_->on_cuda(); }
  [[noreturn]] void refuse(const std::string& what) const { throw py::value_error(std::string(op_) + ": " + what); }

  // The size that a letter stands for, of a tensor that was checked or as it was set.
  int64_t size(char letter) const { return find(letter)->size; }
  void set(char letter, int64_t size);

  // Dense tensors of the leading one's dtype, of int64, and such as are written.
  void floats(const Argument& argument, const char* dims) { check(argument, dims, dtype_); }
  void integers(const Argument& argument, const char* dims) { check(argument, dims, dlpack::kInt64); }
  void written(const Argument& argument, const char* dims);
  void optional(const Argument& argument, const char* dims) {
    if (argument.given()) floats(argument, dims);
  }
  // Tensors that one of the devices does not take.
  void none_on_cuda(const Argument& argument) const;
  void none_on_cpu(const Argument& argument) const;
  // The same without dims, which the entry checks itself; `rows`: dense along the last axis alone.
  void floats(const Argument& argument) const { argument.require_dense(dtype_, leading_); }
  void written(const Argument& argument) const;
  void rows(const Argument& argument) const { argument.require_dense_rows(dtype_, leading_); }
  // One number, which the kernel's precision must be able to hold.
  void number(const char* name, double value) const;
  // One, or on the CPU one for each of `members`.
  void numbers(const Numbers& numbers, const Dim& members) const;

  // make(T()) gives the kernel's arguments for elements of type T, float or double; start(arguments, queue) is the
  // kernel on CUDA. The interpreter's lock is released meanwhile.
  template <class Make, class Start>
  void run(const Make& make, [[maybe_unused]] const Start& start) const {
    const auto run = [&](auto type) {
      const auto args = make(type);
      const py::gil_scoped_release release;
      if constexpr (kWithCuda) {
        if (on_cuda()) return start(args, execution_->queue());
      }
      cpu::kernels()(args, threads_);
    };
    dtype_ == dlpack::kFloat64 ? run(double()) : run(float());
  }
  // Where the entry refuses CUDA.
  template <class Make>
  void run(const Make& make) const {
    run(make, [](const auto&, const cuda::Queue&) {});
  }
  // A scan over the leading tensor's [S, T, B, H] with these products a step, of Storage::any: start(arguments,
  // execution).
  template <class Make, class Start>
  void run_scan(const StepProducts& products, const Make& make, const Start& start) const {
    if (!on_cuda()) return run(make);
    run_scan_on_cuda(products, make, start);
  }
  // Where the entry refuses the CPU.
  template <class Make, class Start>
  void run_scan_on_cuda([[maybe_unused]] const StepProducts& products, [[maybe_unused]] const Make& make,
                        [[maybe_unused]] const Start& start) const {
    if constexpr (kWithCuda) {
      execution_->require_step(size('T'), products, leading_, *find('S'), *find('B'), *find('H'));
      with_storage_type(dtype_, [&](auto type) {
        const auto args = make(type);
        const py::gil_scoped_release release;
        start(args, execution_->rnn());
      });
    }
  }

 protected:
  // Null where the letter is not known.
  const Dim* find(char letter) const;

 private:
  void check(const Argument& argument, const char* dims, dlpack::DataType dtype);

  const char* op_;
  const Argument& leading_;
  std::optional<Execution> execution_;
  const dlpack::DataType dtype_;
  int threads_ = 1;

  static constexpr int kMostLetters = 8;
  Dim dims_[kMostLetters];
  char letters_[kMostLetters][2];  // what the symbols of dims_ point to
  int known_ = 0;
};

// How a parameter of an entry comes from Python: tensors are read when the call begins and held until it ends.
template <class Parameter>
struct Passed {
  using Type = Parameter;
  static Parameter read(const char*, const char*, Type value) { return value; }
};
template <>
struct Passed<const Argument&> {
  using Type = const py::object&;
  static Argument read(const char* op, const char* name, Type value) { return Argument(op, name, value); }
};
template <>
struct Passed<const Numbers&> {
  using Type = const std::vector<double>&;
  static Numbers read(const char*, const char* name, Type values) { return Numbers(name, values); }
};

template <class Result, class... Parameters, size_t... I>
void define(py::module_& m, const char* op, Result (*entry)(const char*, Parameters...), const char* const* names,
            std::index_sequence<I...>) {
  const std::array<const char*, sizeof...(I)> kept{names[I]...};
  m.def(
      op,
      [=](typename Passed<Parameters>::Type... values) {
        return entry(op, Passed<Parameters>::read(op, kept[I], values)...);
      },
      py::arg(names[I])...);
}

// `_C.op`, whose parameters beyond the op have these names; a tensor's errors give them.
template <class Result, class... Parameters>
void define(py::module_& m, const char* op, Result (*entry)(const char* op, Parameters...),
            const char* const (&names)[sizeof...(Parameters)]) {
  define(m, op, entry, names, std::index_sequence_for<Parameters...>());
}

}  // namespace tpext::bindings
