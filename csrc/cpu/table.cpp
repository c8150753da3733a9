// The table of one instruction set's kernels: compiled with them, once a set.
#include "cpu/kernels.h"

namespace tpext::cpu::TPEXT_CAPABILITY {

#define TPEXT_KERNEL(function, Arguments)      \
  void function(const Arguments<float>&, int); \
  void function(const Arguments<double>&, int);
#include "cpu/kernels.def"
#undef TPEXT_KERNEL

#define TPEXT_TEXT(name) #name
#define TPEXT_NAME(name) TPEXT_TEXT(name)
extern constinit const Kernels table = {
    TPEXT_NAME(TPEXT_CAPABILITY),
#define TPEXT_KERNEL(function, Arguments) function, function,
#include "cpu/kernels.def"
#undef TPEXT_KERNEL
};

}  // namespace tpext::cpu::TPEXT_CAPABILITY
