// The kernels of one instruction set as a table of functions, and the choice of the table when the module is loaded.
#pragma once

#include "core/act_inverse.h"
#include "core/counter_normal.h"
#include "core/gated.h"
#include "core/kaczmarz.h"
#include "core/pooled_difference.h"
#include "core/regularized_inverse.h"
#include "core/rnn.h"

namespace tpext::cpu {

struct Kernels {
  const char* capability;
#define TPEXT_KERNEL(function, Arguments)                         \
  void (*function##_float)(const Arguments<float>&, int threads); \
  void (*function##_double)(const Arguments<double>&, int threads);
#include "cpu/kernels.def"
#undef TPEXT_KERNEL

  // Each kernel is called by what it takes.
#define TPEXT_KERNEL(function, Arguments)                                                               \
  void operator()(const Arguments<float>& args, int threads) const { function##_float(args, threads); } \
  void operator()(const Arguments<double>& args, int threads) const { function##_double(args, threads); }
#include "cpu/kernels.def"
#undef TPEXT_KERNEL
};

// The best compiled instruction set that this processor runs, or the one that the environment variable
// TPEXT_CPU_CAPABILITY names. Throws std::runtime_error where that one is unknown, not compiled or not supported here.
const Kernels& kernels();

// Names of the compiled instruction sets, least first, with a null at the end.
const char* const* compiled_capabilities();

}  // namespace tpext::cpu
