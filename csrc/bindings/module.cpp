// The module `_C`: one entry a kernel. Types are documented in tpext/_C.pyi, semantics in tpext/ops.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "bindings/entries.h"
#include "cpu/kernels.h"
#include "cpu/processors.h"

#ifndef TPEXT_VERSION
#error "TPEXT_VERSION comes from CMakeLists.txt"
#endif

#ifdef TPEXT_CUDA_EMULATION
#include "cuda/launch.h"
#define TPEXT_MODULE _C_emulated
#else
#define TPEXT_MODULE _C
#endif

namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["version"] = TPEXT_VERSION;
  info["commit"] = TPEXT_COMMIT;
  info["compiler"] = TPEXT_COMPILER;
  py::list capabilities, architectures;
  for (const char* const* name = tpext::cpu::compiled_capabilities(); *name != nullptr; ++name)
    capabilities.append(*name);
  info["cpu_capabilities"] = capabilities;
  info["cuda_compiler"] = py::none();
#ifdef TPEXT_CUDA_COMPILER
  info["cuda_compiler"] = TPEXT_CUDA_COMPILER;
  std::istringstream names(TPEXT_CUDA_ARCHITECTURES);
  for (std::string name; names >> name;) architectures.append(name);
#endif
  info["cuda_architectures"] = architectures;
  return info;
}

}  // namespace

PYBIND11_MODULE(TPEXT_MODULE, m) {
  m.doc() =
      "Kernels of tpext. Use torch.ops.tpext or tpext.nn: these entries take DLPack capsules and write into outputs.";
  // An override that cannot be followed fails here, at import, rather than at the first kernel.
  tpext::cpu::kernels();
  m.def("build_info", &build_info);
  m.def("cpu_capability", [] { return tpext::cpu::kernels().capability; });
  m.def("usable_processors", &tpext::cpu::usable_processors);
  m.def(
      "quota_processors",
      [](const std::string& membership, const std::string& mount, int otherwise) {
        return tpext::cpu::quota_processors(membership.c_str(), mount.c_str(), otherwise);
      },
      py::arg("membership"), py::arg("mount"), py::arg("otherwise"));
  tpext::bindings::define_act_inverse(m);
  tpext::bindings::define_counter_normal(m);
  tpext::bindings::define_gated(m);
  tpext::bindings::define_kaczmarz(m);
  tpext::bindings::define_large_array(m);
  tpext::bindings::define_pooled_difference(m);
  tpext::bindings::define_regularized_inverse(m);
  tpext::bindings::define_rnn(m);
#ifdef TPEXT_CUDA_EMULATION
  m.def("set_emulation_seed", &tpext::cuda::set_emulation_seed, py::arg("seed"));
  m.def(
      "set_emulated_limits",
      [](int capability, int multiprocessors, int shared_memory) {
        tpext::cuda::set_emulated_limits({capability, multiprocessors, shared_memory, true});
      },
      py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_memory"));
#endif
}
