// A fiber's registers and stack, and the switch from one to another, without a system call.
#pragma once

#include <setjmp.h>

#include <cstddef>

namespace tpext::cuda::emulation {

#if defined(__x86_64__) && !defined(TPEXT_PORTABLE_FIBERS)

void switch_stack(void** from, void* to);

class Context {
 public:
  // So that the first switch to it calls `body`, which must not return.
  void prepare(char* stack, size_t bytes, void (*body)());
  void switch_to(const Context& other) {
    if (this != &other) switch_stack(&top_, other.top_);
  }

 private:
  void* top_;
};

#else

// For the other hosts; TPEXT_PORTABLE_FIBERS chooses it on x86-64, to test it. makecontext and setcontext enter the
// stack; they make system calls, and are not used for more.
class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*body)());
  void switch_to(const Context& other);

 private:
  static void enter();

  static inline jmp_buf preparer_;
  static inline Context* prepared_;
  static inline void (*body_)();
  jmp_buf saved_;
};

#endif

}  // namespace tpext::cuda::emulation
