// Pages of the host's memory, for stacks and for the shared memory of blocks.
#pragma once

#include <cstddef>
#include <string>

namespace tpext::cuda::emulation {

[[noreturn]] void throw_error(const std::string& text);

size_t page_bytes();
char* map_pages(size_t bytes);
// `protection` as mprotect takes it.
void protect(char* pages, size_t bytes, int protection);

// Shared memory of one block: [slack, bytes][inaccessible page].
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { unmap(); }

  // Returns so many bytes, full of NaNs.
  char* prepare(size_t bytes);
  // Until it is prepared again.
  void close();

 private:
  void unmap();

  char* pages_ = nullptr;
  size_t usable_ = 0;
  bool closed_ = false;
};

}  // namespace tpext::cuda::emulation
