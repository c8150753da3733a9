// The checked longjmp of the C library takes a jump to another stack for an error.
#undef _FORTIFY_SOURCE

#include "cuda/emulation/context.h"

#include <ucontext.h>

namespace tpext::cuda::emulation {

#if defined(__x86_64__) && !defined(TPEXT_PORTABLE_FIBERS)

// Every fiber comes here by the same calls, which keeps the processor's prediction of returns right; after longjmp it
// is wrong, and a switch takes four times as long. noipa: callers must not look which registers it changes.
[[gnu::naked, gnu::noipa]] void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

void Context::prepare(char* stack, size_t bytes, void (*body)()) {
  constexpr size_t saved_registers = 6;
  void** top = reinterpret_cast<void**>(stack + bytes / 16 * 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(body);
  top_ = top - saved_registers;
}

#else

void Context::prepare(char* stack, size_t bytes, void (*body)()) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  prepared_ = this;
  body_ = body;
  if (_setjmp(preparer_) == 0) setcontext(&context);
}

void Context::switch_to(const Context& other) {
  if (_setjmp(saved_) == 0) _longjmp(const_cast<jmp_buf&>(other.saved_), 1);
}

void Context::enter() {
  void (*const body)() = body_;
  if (_setjmp(prepared_->saved_) == 0) _longjmp(preparer_, 1);
  body();
}

#endif

}  // namespace tpext::cuda::emulation
