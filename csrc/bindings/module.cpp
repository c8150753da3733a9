// The module `_C`: one entry a kernel. Tensors come as DLPack, outputs are allocated by the caller, the GIL is released
// while a kernel runs. Types are documented in tpext/_C.pyi, semantics in tpext/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "core/regularized_inverse.h"
#include "core/rnn.h"
#include "cpu/kernels.h"

#ifndef TPEXT_VERSION
#error "TPEXT_VERSION comes from CMakeLists.txt"
#endif

namespace {

using tpext::bindings::Argument;
using tpext::bindings::choose;
using tpext::bindings::Dim;
namespace dlpack = tpext::dlpack;
namespace py = pybind11;

constexpr dlpack::DataType kFloat32{dlpack::kFloat, 32, 1}, kFloat64{dlpack::kFloat, 64, 1},
    kInt64{dlpack::kInt, 64, 1};

// OpenMP ends the process when the system refuses it a thread.
constexpr int kMaxThreads = 1024;

const std::vector<const char*> kNonlinearities = {"tanh", "relu", "identity"};
const std::vector<const char*> kCorrections = {"linearized", "difference", "none"};
const std::vector<const char*> kCredits = {"local", "through_time"};

void require_threads(const char* op, int threads) {
  if (threads < 1 || threads > kMaxThreads)
    throw py::value_error(std::string(op) + ": num_threads must lie in 1.." + std::to_string(kMaxThreads) + ", got " +
                          std::to_string(threads));
}

// The sizes of a recurrent call, taken from its leading [S, T, B, H] argument, and the checks that follow from them.
class Call {
 public:
  Call(const char* op, const Argument& leading, const Argument& lengths, const std::vector<bool>& reverse, int threads)
      : op_(op), reverse_(reverse.begin(), reverse.end()), threads_(threads) {
    leading.require_rank({"S", "T", "B", "H"});
    S_ = {"S", leading.size(0)}, T_ = {"T", leading.size(1)}, B_ = {"B", leading.size(2)}, H_ = {"H", leading.size(3)};
    const dlpack::DataType dtype = leading.dtype();
    double_ = dtype.code == dlpack::kFloat && dtype.bits == 64;
    leading.require_dense(double_ ? kFloat64 : kFloat32);
    if (static_cast<int64_t>(reverse.size()) != S_.size)
      throw py::value_error(std::string(op) + ": reverse must have S=" + std::to_string(S_.size) + " values, got " +
                            std::to_string(reverse.size()));
    require_threads(op, threads);
    if (lengths.given()) {
      lengths.require_shape({B_});
      lengths.require_dense(kInt64);
    }
    sizes_ = {S_.size, T_.size, B_.size, H_.size, lengths.data<const int64_t>(), reverse_.data()};
  }

  void sequence(const Argument& argument) const { check(argument, {S_, T_, B_, H_}); }
  void initial(const Argument& argument) const { check(argument, {S_, B_, H_}); }
  void weight(const Argument& argument) const { check(argument, {S_, H_, H_}); }
  void rows(const Argument& argument) const { check(argument, {S_, T_, B_}); }
  void units(const Argument& argument) const { check(argument, {S_, H_}); }
  void optional_sequence(const Argument& argument) const {
    if (argument.given()) sequence(argument);
  }
  void optional_initial(const Argument& argument) const {
    if (argument.given()) initial(argument);
  }
  void written_sequence(const Argument& argument) const {
    sequence(argument);
    argument.prefer_huge_pages();
  }
  // [T, B, I] with any strides of T and B; returns I.
  int64_t input(const Argument& argument) const {
    argument.require_rank({"T", "B", "I"});
    const Dim I{"I", argument.size(2)};
    argument.require_shape({T_, B_, I});
    argument.require_dense_rows(double_ ? kFloat64 : kFloat32);
    return I.size;
  }
  void input_weight(const Argument& argument, int64_t inputs) const { check(argument, {S_, H_, {"I", inputs}}); }

  const tpext::RnnSizes& sizes() const { return sizes_; }
  bool is_double() const { return double_; }

  template <class Args>
  void run(const Args& args) const {
    const py::gil_scoped_release release;
    tpext::cpu::kernels()(args, threads_);
  }

 private:
  void check(const Argument& argument, const std::vector<Dim>& dims) const {
    argument.require_shape(dims);
    argument.require_dense(double_ ? kFloat64 : kFloat32);
  }

  const char* op_;
  std::vector<uint8_t> reverse_;
  int threads_;
  Dim S_{}, T_{}, B_{}, H_{};
  bool double_ = false;
  tpext::RnnSizes sizes_{};
};

tpext::Nonlinearity nonlinearity_of(const char* op, const std::string& value) {
  return static_cast<tpext::Nonlinearity>(choose(op, "nonlinearity", value, kNonlinearities));
}

template <class T>
tpext::RnnInput<T> input_of(const Argument& input) {
  if (!input.given()) return {};
  return {input.data<const T>(), input.size(2), input.stride(0), input.stride(1)};
}

void rnn_scan(const py::object& x_proj_, const py::object& input_, const py::object& weight_ih_,
              const py::object& bias_, const py::object& h0_, const py::object& weight_hh_, const py::object& lengths_,
              const std::vector<bool>& reverse, const std::string& nonlinearity, const py::object& states_,
              const py::object& h_n_, int threads) {
  constexpr const char* op = "rnn_scan";
  const Argument x_proj(op, "x_proj", x_proj_), input(op, "input", input_), weight_ih(op, "weight_ih", weight_ih_),
      bias(op, "bias", bias_), h0(op, "h0", h0_), weight_hh(op, "weight_hh", weight_hh_),
      lengths(op, "lengths", lengths_), states(op, "states", states_), h_n(op, "h_n", h_n_);
  const Call call(op, states, lengths, reverse, threads);
  if (x_proj.given()) {
    call.sequence(x_proj);
  } else {
    call.input_weight(weight_ih, call.input(input));
    if (bias.given()) call.units(bias);
  }
  call.initial(h0);
  call.weight(weight_hh);
  call.written_sequence(states);
  call.optional_initial(h_n);
  const tpext::Nonlinearity a = nonlinearity_of(op, nonlinearity);
  const auto run = [&]<class T>(T) {
    call.run(tpext::RnnScan<T>{.sizes = call.sizes(),
                               .nonlinearity = a,
                               .x_proj = x_proj.data<const T>(),
                               .input = input_of<T>(input),
                               .weight_ih = weight_ih.data<const T>(),
                               .bias = bias.data<const T>(),
                               .h0 = h0.data<const T>(),
                               .weight_hh = weight_hh.data<const T>(),
                               .states = states.data<T>(),
                               .h_n = h_n.data<T>()});
  };
  call.is_double() ? run(double()) : run(float());
}

void rnn_scan_backward(const py::object& grad_states_, const py::object& grad_h_n_, const py::object& states_,
                       const py::object& weight_hh_, const py::object& lengths_, const std::vector<bool>& reverse,
                       const std::string& nonlinearity, const py::object& grad_x_proj_, const py::object& grad_h0_,
                       int threads) {
  constexpr const char* op = "rnn_scan_backward";
  const Argument grad_states(op, "grad_states", grad_states_), grad_h_n(op, "grad_h_n", grad_h_n_),
      states(op, "states", states_), weight_hh(op, "weight_hh", weight_hh_), lengths(op, "lengths", lengths_),
      grad_x_proj(op, "grad_x_proj", grad_x_proj_), grad_h0(op, "grad_h0", grad_h0_);
  const Call call(op, states, lengths, reverse, threads);
  call.optional_sequence(grad_states);
  call.optional_initial(grad_h_n);
  call.weight(weight_hh);
  call.written_sequence(grad_x_proj);
  call.initial(grad_h0);
  const tpext::Nonlinearity a = nonlinearity_of(op, nonlinearity);
  const auto run = [&]<class T>(T) {
    call.run(tpext::RnnScanBackward<T>{.sizes = call.sizes(),
                                       .nonlinearity = a,
                                       .grad_states = grad_states.data<const T>(),
                                       .grad_h_n = grad_h_n.data<const T>(),
                                       .states = states.data<const T>(),
                                       .weight_hh = weight_hh.data<const T>(),
                                       .grad_x_proj = grad_x_proj.data<T>(),
                                       .grad_h0 = grad_h0.data<T>()});
  };
  call.is_double() ? run(double()) : run(float());
}

void rnn_target_scan(const py::object& grad_states_, const py::object& disp_n_, const py::object& credit_n_,
                     const py::object& states_, const py::object& h0_, const py::object& weight_hh_,
                     const py::object& inverse_, const py::object& x_proj_, const py::object& lengths_,
                     const std::vector<bool>& reverse, const std::string& nonlinearity, const std::string& correction,
                     const std::string& credit, double target_step, double clip, const py::object& delta_,
                     const py::object& disp_h0_, const py::object& credit_h0_, const py::object& norms_,
                     const py::object& displacement_, int threads) {
  constexpr const char* op = "rnn_target_scan";
  const Argument grad_states(op, "grad_states", grad_states_), disp_n(op, "disp_n", disp_n_),
      credit_n(op, "credit_n", credit_n_), states(op, "states", states_), h0(op, "h0", h0_),
      weight_hh(op, "weight_hh", weight_hh_), inverse(op, "inverse", inverse_), x_proj(op, "x_proj", x_proj_),
      lengths(op, "lengths", lengths_), delta(op, "delta", delta_), disp_h0(op, "disp_h0", disp_h0_),
      credit_h0(op, "credit_h0", credit_h0_), norms(op, "norms", norms_),
      displacement(op, "displacement", displacement_);
  const Call call(op, states, lengths, reverse, threads);
  const tpext::Nonlinearity a = nonlinearity_of(op, nonlinearity);
  const auto c = static_cast<tpext::Correction>(choose(op, "correction", correction, kCorrections));
  const bool through_time = choose(op, "credit", credit, kCredits) == 1;
  call.optional_sequence(grad_states);
  call.optional_initial(disp_n);
  call.optional_initial(credit_n);
  call.initial(h0);
  call.weight(weight_hh);
  call.weight(inverse);
  if (c == tpext::Correction::none) call.sequence(x_proj);
  call.written_sequence(delta);
  call.initial(disp_h0);
  call.optional_initial(credit_h0);
  if (norms.given()) call.rows(norms);
  if (displacement.given()) call.written_sequence(displacement);
  const auto run = [&]<class T>(T) {
    call.run(tpext::RnnTargetScan<T>{.sizes = call.sizes(),
                                     .nonlinearity = a,
                                     .correction = c,
                                     .through_time = through_time,
                                     .target_step = static_cast<T>(target_step),
                                     .clip = static_cast<T>(clip),
                                     .grad_states = grad_states.data<const T>(),
                                     .disp_n = disp_n.data<const T>(),
                                     .credit_n = credit_n.data<const T>(),
                                     .states = states.data<const T>(),
                                     .h0 = h0.data<const T>(),
                                     .weight_hh = weight_hh.data<const T>(),
                                     .inverse = inverse.data<const T>(),
                                     .x_proj = x_proj.data<const T>(),
                                     .reverse_pre = nullptr,
                                     .delta = delta.data<T>(),
                                     .disp_h0 = disp_h0.data<T>(),
                                     .credit_h0 = credit_h0.data<T>(),
                                     .norms = norms.data<T>(),
                                     .displacement = displacement.data<T>()});
  };
  call.is_double() ? run(double()) : run(float());
}

void rnn_learned_target_scan(const py::object& grad_states_, const py::object& disp_n_, const py::object& credit_n_,
                             const py::object& states_, const py::object& weight_hh_, const py::object& reverse_weight_,
                             const py::object& reverse_pre_, const py::object& lengths_,
                             const std::vector<bool>& reverse, const std::string& nonlinearity,
                             const std::string& credit, double target_step, const py::object& delta_,
                             const py::object& disp_h0_, const py::object& credit_h0_, const py::object& norms_,
                             int threads) {
  constexpr const char* op = "rnn_learned_target_scan";
  const Argument grad_states(op, "grad_states", grad_states_), disp_n(op, "disp_n", disp_n_),
      credit_n(op, "credit_n", credit_n_), states(op, "states", states_), weight_hh(op, "weight_hh", weight_hh_),
      reverse_weight(op, "reverse_weight", reverse_weight_), reverse_pre(op, "reverse_pre", reverse_pre_),
      lengths(op, "lengths", lengths_), delta(op, "delta", delta_), disp_h0(op, "disp_h0", disp_h0_),
      credit_h0(op, "credit_h0", credit_h0_), norms(op, "norms", norms_);
  const Call call(op, states, lengths, reverse, threads);
  const tpext::Nonlinearity a = nonlinearity_of(op, nonlinearity);
  const bool through_time = choose(op, "credit", credit, kCredits) == 1;
  call.optional_sequence(grad_states);
  call.optional_initial(disp_n);
  call.optional_initial(credit_n);
  call.weight(weight_hh);
  call.weight(reverse_weight);
  call.sequence(reverse_pre);
  call.written_sequence(delta);
  call.initial(disp_h0);
  call.optional_initial(credit_h0);
  if (norms.given()) call.rows(norms);
  const auto run = [&]<class T>(T) {
    call.run(tpext::RnnTargetScan<T>{.sizes = call.sizes(),
                                     .nonlinearity = a,
                                     .correction = tpext::Correction::learned,
                                     .through_time = through_time,
                                     .target_step = static_cast<T>(target_step),
                                     .clip = T(0),
                                     .grad_states = grad_states.data<const T>(),
                                     .disp_n = disp_n.data<const T>(),
                                     .credit_n = credit_n.data<const T>(),
                                     .states = states.data<const T>(),
                                     .h0 = nullptr,
                                     .weight_hh = weight_hh.data<const T>(),
                                     .inverse = reverse_weight.data<const T>(),
                                     .x_proj = nullptr,
                                     .reverse_pre = reverse_pre.data<const T>(),
                                     .delta = delta.data<T>(),
                                     .disp_h0 = disp_h0.data<T>(),
                                     .credit_h0 = credit_h0.data<T>(),
                                     .norms = norms.data<T>(),
                                     .displacement = nullptr});
  };
  call.is_double() ? run(double()) : run(float());
}

void rnn_weight_gradients(const py::object& delta_, const py::object& states_, const py::object& h0_,
                          const py::object& input_, const py::object& lengths_, const std::vector<bool>& reverse,
                          double scale, const py::object& grad_weight_ih_, const py::object& grad_weight_hh_,
                          const py::object& grad_bias_, int threads) {
  constexpr const char* op = "rnn_weight_gradients";
  const Argument delta(op, "delta", delta_), states(op, "states", states_), h0(op, "h0", h0_),
      input(op, "input", input_), lengths(op, "lengths", lengths_),
      grad_weight_ih(op, "grad_weight_ih", grad_weight_ih_), grad_weight_hh(op, "grad_weight_hh", grad_weight_hh_),
      grad_bias(op, "grad_bias", grad_bias_);
  const Call call(op, delta, lengths, reverse, threads);
  call.sequence(states);
  call.initial(h0);
  const int64_t inputs = call.input(input);
  if (grad_weight_ih.given()) call.input_weight(grad_weight_ih, inputs);
  if (grad_weight_hh.given()) call.weight(grad_weight_hh);
  if (grad_bias.given()) call.units(grad_bias);
  const auto run = [&]<class T>(T) {
    call.run(tpext::RnnWeightGradients<T>{.sizes = call.sizes(),
                                          .scale = static_cast<T>(scale),
                                          .delta = delta.data<const T>(),
                                          .states = states.data<const T>(),
                                          .h0 = h0.data<const T>(),
                                          .input = input_of<T>(input),
                                          .grad_weight_ih = grad_weight_ih.data<T>(),
                                          .grad_weight_hh = grad_weight_hh.data<T>(),
                                          .grad_bias = grad_bias.data<T>()});
  };
  call.is_double() ? run(double()) : run(float());
}

// Returns the number of matrices whose status is not ok, so that a caller need not read them.
int64_t regularized_inverse(const py::object& weight_, double reg, const py::object& inverse_,
                            const py::object& status_, int threads) {
  constexpr const char* op = "regularized_inverse";
  const Argument weight(op, "weight", weight_), inverse(op, "inverse", inverse_), status(op, "status", status_);
  weight.require_rank({"batch", "M", "N"});
  const Dim batch{"batch", weight.size(0)}, M{"M", weight.size(1)}, N{"N", weight.size(2)};
  const dlpack::DataType dtype = weight.dtype();
  const bool is_double = dtype.code == dlpack::kFloat && dtype.bits == 64;
  weight.require_dense(is_double ? kFloat64 : kFloat32);
  inverse.require_shape({batch, N, M});
  inverse.require_dense(is_double ? kFloat64 : kFloat32);
  status.require_shape({batch});
  status.require_dense(kInt64);
  if (!(reg >= 0)) throw py::value_error(std::string(op) + ": reg must be >= 0, got " + std::to_string(reg));
  require_threads(op, threads);
  const auto run = [&]<class T>(T) {
    const py::gil_scoped_release release;
    tpext::cpu::kernels()(
        tpext::RegularizedInverse<T>{batch.size, M.size, N.size, static_cast<T>(reg), weight.data<const T>(),
                                     inverse.data<T>(), status.data<int64_t>()},
        threads);
  };
  is_double ? run(double()) : run(float());
  const auto* const statuses = status.data<const int64_t>();
  return batch.size - std::count(statuses, statuses + batch.size, 0);
}

py::dict build_info() {
  py::dict info;
  info["version"] = TPEXT_VERSION;
  info["commit"] = TPEXT_COMMIT;
  info["compiler"] = TPEXT_COMPILER;
  py::list capabilities;
  for (const char* const* name = tpext::cpu::compiled_capabilities(); *name != nullptr; ++name)
    capabilities.append(*name);
  info["cpu_capabilities"] = capabilities;
  info["cuda_architectures"] = py::list();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Kernels of tpext. Use torch.ops.tpext or tpext.nn: these entries take DLPack capsules and write into outputs.";
  // An override that cannot be followed fails here, at import, rather than at the first kernel.
  tpext::cpu::kernels();
  m.def("build_info", &build_info);
  m.def("cpu_capability", [] { return tpext::cpu::kernels().capability; });
  m.def("regularized_inverse", &regularized_inverse, py::arg("weight"), py::arg("reg"), py::arg("inverse"),
        py::arg("status"), py::arg("num_threads"));
  m.def("rnn_scan", &rnn_scan, py::arg("x_proj"), py::arg("input"), py::arg("weight_ih"), py::arg("bias"),
        py::arg("h0"), py::arg("weight_hh"), py::arg("lengths"), py::arg("reverse"), py::arg("nonlinearity"),
        py::arg("states"), py::arg("h_n"), py::arg("num_threads"));
  m.def("rnn_scan_backward", &rnn_scan_backward, py::arg("grad_states"), py::arg("grad_h_n"), py::arg("states"),
        py::arg("weight_hh"), py::arg("lengths"), py::arg("reverse"), py::arg("nonlinearity"), py::arg("grad_x_proj"),
        py::arg("grad_h0"), py::arg("num_threads"));
  m.def("rnn_target_scan", &rnn_target_scan, py::arg("grad_states"), py::arg("disp_n"), py::arg("credit_n"),
        py::arg("states"), py::arg("h0"), py::arg("weight_hh"), py::arg("inverse"), py::arg("x_proj"),
        py::arg("lengths"), py::arg("reverse"), py::arg("nonlinearity"), py::arg("correction"), py::arg("credit"),
        py::arg("target_step"), py::arg("clip"), py::arg("delta"), py::arg("disp_h0"), py::arg("credit_h0"),
        py::arg("norms"), py::arg("displacement"), py::arg("num_threads"));
  m.def("rnn_learned_target_scan", &rnn_learned_target_scan, py::arg("grad_states"), py::arg("disp_n"),
        py::arg("credit_n"), py::arg("states"), py::arg("weight_hh"), py::arg("reverse_weight"), py::arg("reverse_pre"),
        py::arg("lengths"), py::arg("reverse"), py::arg("nonlinearity"), py::arg("credit"), py::arg("target_step"),
        py::arg("delta"), py::arg("disp_h0"), py::arg("credit_h0"), py::arg("norms"), py::arg("num_threads"));
  m.def("rnn_weight_gradients", &rnn_weight_gradients, py::arg("delta"), py::arg("states"), py::arg("h0"),
        py::arg("input"), py::arg("lengths"), py::arg("reverse"), py::arg("scale"), py::arg("grad_weight_ih"),
        py::arg("grad_weight_hh"), py::arg("grad_bias"), py::arg("num_threads"));
}
