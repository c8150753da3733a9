#include "bindings/execution.h"

namespace tpext::bindings {

namespace {

// OpenMP ends the process when the system refuses it a thread.
constexpr int kMaxThreads = 1024;

#ifdef TPEXT_CUDA_EMULATION
// Memory of the CPU stands for that of the device: the execution alone says where a call runs.
bool runs_on_cuda(const Argument&, const py::object& value) { return py::isinstance<py::tuple>(value); }
constexpr int32_t kDeviceType = dlpack::kCpu;
#else
bool runs_on_cuda(const Argument& leading, const py::object&) { return leading.device().type == dlpack::kCuda; }
constexpr int32_t kDeviceType = dlpack::kCuda;
#endif

std::string type_name(const py::object& value) { return py::str(py::type::handle_of(value).attr("__name__")); }

constexpr size_t kSweepParts = 3, kStepParts = 6;

bool has_parts(const py::object& value, size_t count) {
  return py::isinstance<py::tuple>(value) && py::len(value) == count;
}

py::object part(const py::object& value, size_t index) {
  const bool right = has_parts(value, kSweepParts) || has_parts(value, kStepParts);
  return right && index < py::len(value) ? py::object(value[py::int_(index)]) : py::none();
}

}  // namespace

int threads_of(const char* op, const char* name, const py::object& value) {
  int overflow = 0;
  const long long threads = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow == 0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (overflow != 0 || threads < 1 || threads > kMaxThreads)
    throw py::value_error(std::string(op) + ": " + name + " must lie in 1.." + std::to_string(kMaxThreads) +
                          " threads on the CPU, got " + std::string(py::str(value)));
  return static_cast<int>(threads);
}

void require_cuda() {
  if (!kWithCuda)
    throw std::runtime_error(
        "tpext was built without CUDA kernels; rebuild where nvcc is found, or with TPEXT_CUDA=on");
}

Execution::Execution(const char* op, const Argument& leading, const py::object& value)
    : workspace_(op, "workspace", part(value, 2)),
      sums_(op, "sums", part(value, 4)),
      carried_(op, "carried", part(value, 5)) {
  leading.require();
  const dlpack::Device device = leading.device();
  if (device.type != dlpack::kCpu && device.type != kDeviceType)
    throw py::value_error(leading.label() + " must be on the CPU or a CUDA device, got " + device_name(device));
  const std::string place = std::string(leading.name()) + " is on " + device_name(device);
  on_cuda_ = runs_on_cuda(leading, value);
  if (!on_cuda_) {
    if (!py::isinstance<py::int_>(value))
      throw py::type_error(std::string(op) + ": execution must be a number of threads where " + place + ", got " +
                           type_name(value));
    threads_ = threads_of(op, "execution", value);
    return;
  }
  require_cuda();
  const bool single = has_parts(value, kStepParts);
  if (!(single || has_parts(value, kSweepParts)) || !py::isinstance<py::int_>(part(value, 0)) ||
      !py::isinstance<py::str>(part(value, 1)) || (single && !py::isinstance<py::int_>(part(value, 3))))
    throw py::type_error(std::string(op) + ": execution must be (stream: int, regime: str, workspace) or (stream, " +
                         "\"step\", None, step: int, sums, carried) where " + place + ", got " +
                         (py::isinstance<py::tuple>(value) ? std::string(py::str(value)) : type_name(value)));
  void* const stream = PyLong_AsVoidPtr(part(value, 0).ptr());
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  const auto regime = static_cast<cuda::Regime>(choose(op, "regime", py::cast<std::string>(part(value, 1)), kRegimes));
  if ((regime == cuda::Regime::step) != single)
    throw py::value_error(std::string(op) + ": execution must have six parts for regime \"step\" and three for the " +
                          "others, got " + std::string(py::str(value)));
  rnn_.queue = {device.id, stream};
  rnn_.regime = regime;
  if (single) rnn_.step = py::cast<int64_t>(part(value, 3));
  if (workspace_.given()) {
    workspace_.require_rank({"bytes"});
    workspace_.require_dense(dlpack::kUint8, leading);
    rnn_.workspace = workspace_.data<void>();
    rnn_.workspace_bytes = workspace_.size(0);
  }
  rnn_.sums = sums_.data<const void>();
  rnn_.carried = carried_.data<void>();
}

void Execution::require_step(int64_t steps, const StepProducts& products, const Argument& leading, const Dim& S,
                             const Dim& B, const Dim& H) const {
  if (!on_cuda_ || rnn_.regime != cuda::Regime::step) return;
  const auto require = [&](const Argument& argument, int64_t blocks) {
    const std::string symbol = (blocks == 1 ? "" : std::to_string(blocks)) + H.symbol;
    argument.require_shape({{"P", products.count}, S, B, {symbol.c_str(), blocks * H.size}});
    argument.require_dense(leading.dtype(), leading);
  };
  require(sums_, products.out);
  require(carried_, products.in);
  if (rnn_.step < 0 || rnn_.step > steps)
    throw py::value_error(leading.label() + " has T=" + std::to_string(steps) + " steps: step must lie in 0..T, got " +
                          std::to_string(rnn_.step));
}

}  // namespace tpext::bindings
