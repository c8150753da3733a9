#include "cuda/emulation/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "cuda/launch.h"

namespace tpext::cuda::emulation {

void throw_error(const std::string& text) { throw CudaError("CUDA emulation: " + text); }

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

char* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw_error("cannot map " + std::to_string(bytes) + " bytes");
  return static_cast<char*>(pages);
}

void protect(char* pages, size_t bytes, int protection) {
  if (mprotect(pages, bytes, protection) != 0) throw_error("cannot protect " + std::to_string(bytes) + " bytes");
}

char* SharedMemory::prepare(size_t bytes) {
  const size_t page = page_bytes(), usable = (bytes + page - 1) / page * page;
  if (pages_ == nullptr || usable != usable_) {
    unmap();
    pages_ = map_pages(usable + page);
    usable_ = usable;
    protect(pages_ + usable, page, PROT_NONE);
  } else if (closed_) {
    protect(pages_, usable_, PROT_READ | PROT_WRITE);
  }
  closed_ = false;
  char* begin = pages_ + usable_ - (bytes + 15) / 16 * 16;
  std::memset(begin, 0xff, static_cast<size_t>(pages_ + usable_ - begin));
  return begin;
}

void SharedMemory::close() { closed_ = mprotect(pages_, usable_, PROT_NONE) == 0; }

void SharedMemory::unmap() {
  if (pages_ != nullptr) munmap(pages_, usable_ + page_bytes());
  pages_ = nullptr;
}

}  // namespace tpext::cuda::emulation
