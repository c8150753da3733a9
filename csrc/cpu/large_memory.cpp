#include "cpu/large_memory.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace tpext::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Blocks that wait at most: those of some layers. The one that has waited longest goes.
constexpr int kMostWaiting = 16;
// And of bytes, with those in use, so many times what was in use at once. A block serves requests of half its size
// too, so blocks that take turns and serve none of the others' requests are together less than twice the largest.
constexpr size_t kMostTimesInUse = 2;

bool wanted() {
  static const bool answer = [] {
    const char* const value = std::getenv("TPEXT_HUGE_PAGES");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  return answer;
}

// None is destroyed at exit: tensors may be freed after that.
std::mutex mutex;
struct {
  LargeMemory blocks[kMostWaiting];  // the longest first
  int count;
  size_t bytes;

  LargeMemory remove(int index) {
    const LargeMemory block = blocks[index];
    for (int i = index + 1; i < count; ++i) blocks[i - 1] = blocks[i];
    --count;
    bytes -= block.bytes;
    return block;
  }

  void add(LargeMemory block) {
    blocks[count++] = block;
    bytes += block.bytes;
  }
} waiting;
size_t in_use, most_in_use;  // bytes

// A child of fork() would find the mutex held for good where another thread had it.
void keep_over_fork() {
  static const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
  (void)registered;
}

void unmap(LargeMemory block) { (void)munmap(block.data, block.bytes); }

// Whole huge pages, at a multiple of their size.
LargeMemory map(size_t bytes) {
  char* const data =
      static_cast<char*>(mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (data == MAP_FAILED) return {nullptr, 0};
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(data) % kHugePage) % kHugePage;
  if (before != 0) unmap({data, before});
  unmap({data + before + bytes, kHugePage - before});
  prefer_huge_pages(data + before, bytes);
  return {data + before, bytes};
}

}  // namespace

void prefer_huge_pages(void* data, size_t bytes) {
  if (!wanted()) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage,
                  last = (begin + bytes) / kHugePage * kHugePage;
  // Advice: where the system refuses it, nothing is lost.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

LargeMemory take_large(size_t bytes) {
  if (!wanted() || bytes == 0 || bytes > SIZE_MAX / 4) return {nullptr, 0};
  keep_over_fork();
  const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const std::lock_guard lock(mutex);
  int best = -1;
  for (int i = 0; i < waiting.count; ++i) {
    const size_t size = waiting.blocks[i].bytes;
    if (size >= whole && size <= 2 * whole && (best < 0 || size <= waiting.blocks[best].bytes)) best = i;
  }
  LargeMemory taken{nullptr, 0};
  if (best >= 0) {
    taken = waiting.remove(best);
  } else {
    const size_t then_in_use = in_use + whole, most = then_in_use > most_in_use ? then_in_use : most_in_use;
    while (waiting.count > 0 && then_in_use + waiting.bytes > kMostTimesInUse * most) unmap(waiting.remove(0));
    taken = map(whole);
  }
  if (taken.data == nullptr) {
    // Where address space or commitments are short, those that wait hold some.
    while (waiting.count > 0) unmap(waiting.remove(0));
    taken = map(whole);
  }
  in_use += taken.bytes;
  if (in_use > most_in_use) most_in_use = in_use;
  return taken;
}

void give_back_large(LargeMemory memory) {
#ifdef MADV_FREE
  (void)madvise(memory.data, memory.bytes, MADV_FREE);
#endif
  LargeMemory oldest{nullptr, 0};
  {
    const std::lock_guard lock(mutex);
    if (waiting.count == kMostWaiting) oldest = waiting.remove(0);
    waiting.add(memory);
    in_use -= memory.bytes;
  }
  if (oldest.data != nullptr) unmap(oldest);
}

#else

void prefer_huge_pages(void*, size_t) {}
LargeMemory take_large(size_t) { return {nullptr, 0}; }
void give_back_large(LargeMemory) {}

#endif

}  // namespace tpext::cpu
