// Memory of large arrays: in pages of 2 MiB, and from call to call.
#pragma once

#include <cstddef>

namespace tpext::cpu {

// Marks the whole pages of 2 MiB among `bytes` bytes from `data` on, on Linux and unless TPEXT_HUGE_PAGES is 0. The
// mark stays for as long as the memory is mapped.
void prefer_huge_pages(void* data, size_t bytes);

struct LargeMemory {
  void* data;
  size_t bytes;
};

// Memory for `bytes` bytes and up to twice as many, in pages of 2 MiB. A training step frees what the next one asks for
// again: the system would take the pages away and give others, zeroed, which for some GiB takes as long as a good part
// of the computation. So what is given back waits for the next taker, a few blocks of it, with those in use at most
// twice what was ever in use at once, and the system may have its pages meanwhile where it is short of memory. Null
// where there is none, on other systems, and if TPEXT_HUGE_PAGES is 0. From any thread.
LargeMemory take_large(size_t bytes);
void give_back_large(LargeMemory memory);

}  // namespace tpext::cpu
