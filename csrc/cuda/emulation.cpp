// The fibers behind cuda/emulation.h, their schedule, and the emulated side of cuda/launch.h.
//
// Fibers switch straight from one to the next, without a system call. A fiber runs one thread of a launch after another
// and is kept between launches. A round takes every runnable fiber once; those that become runnable meanwhile make up
// the next round. One launch runs at a time, whichever host thread asks for it.

// The checked longjmp of the C library takes a jump to another stack for an error.
#undef _FORTIFY_SOURCE

#include "cuda/emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <limits>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

#include "cuda/launch.h"

namespace tpext::cuda {
namespace detail {

const Thread* running = nullptr;
int64_t until_interruption = std::numeric_limits<int64_t>::max();

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kGuardedStacks = 8192;  // the kernel allows a process some 65000 mappings
constexpr int kStacksInAChunk = 128;
constexpr int kMostIdleRounds = 10000;  // after which threads that only spin count as stuck
constexpr int kMostThreads = 1024, kLargestCluster = 16;

[[noreturn]] void throw_error(const std::string& text) { throw CudaError("CUDA emulation: " + text); }

#if defined(__x86_64__) && !defined(TPEXT_PORTABLE_FIBERS)

// Every fiber comes here by the same calls, which keeps the processor's prediction of returns right; after longjmp it
// is wrong, and a switch takes four times as long. noipa: callers must not look which registers it changes.
[[gnu::naked, gnu::noipa]] void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

class Context {
 public:
  // So that the first switch to it calls `body`, which must not return.
  void prepare(char* stack, size_t bytes, void (*body)()) {
    constexpr size_t saved_registers = 6;
    void** top = reinterpret_cast<void**>(stack + bytes / 16 * 16);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(body);
    top_ = top - saved_registers;
  }
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
  void prepare(char* stack, size_t bytes, void (*body)()) {
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
  void switch_to(const Context& other) {
    if (_setjmp(saved_) == 0) _longjmp(const_cast<jmp_buf&>(other.saved_), 1);
  }

 private:
  static void enter() {
    void (*const body)() = body_;
    if (_setjmp(prepared_->saved_) == 0) _longjmp(preparer_, 1);
    body();
  }

  static inline jmp_buf preparer_;
  static inline Context* prepared_;
  static inline void (*body_)();
  jmp_buf saved_;
};

#endif

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

char* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw_error("cannot map " + std::to_string(bytes) + " bytes");
  return static_cast<char*>(pages);
}
void protect(char* pages, size_t bytes, int protection) {
  if (mprotect(pages, bytes, protection) != 0) throw_error("cannot protect " + std::to_string(bytes) + " bytes");
}

// Shared memory of one block: [slack, bytes][inaccessible page].
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { unmap(); }

  char* prepare(size_t bytes) {
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
  void close() { closed_ = mprotect(pages_, usable_, PROT_NONE) == 0; }

 private:
  void unmap() {
    if (pages_ != nullptr) munmap(pages_, usable_ + page_bytes());
    pages_ = nullptr;
  }

  char* pages_ = nullptr;
  size_t usable_ = 0;
  bool closed_ = false;
};

// The values that lanes bring to a collective. Two sets: a lane may be at the next collective before all others have
// read the results of this one.
struct Warp {
  int first_fiber;
  int lanes;
  int arrived;
  int ended;
  Wait kind;
  int set;
  uint64_t values[2][kWarp];
};

struct Cluster {
  int arrived;
  int phase;
  int first_block;  // in the gang
};

struct Block {
  int arrived;
  int ended;
  int first_fiber;
  Cluster* cluster;
  SharedMemory memory;
};

struct Fiber {
  Context context;
  Thread thread;
  Block* block;
  Warp* warp;
  Wait wait;
  bool arrived_in_cluster;
  int awaited_phase;
};

struct Operands {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

struct Call {
  void (*thread)(const void* call);
  const void* call;
  Shape shape;
};

// Which fibers a schedule holds back.
enum class Hold { nothing, threads, warps, blocks };

// Everything that runs together: a cluster, or the whole grid of a cooperative launch.
struct Machine {
  Call call;
  std::vector<Fiber*> fibers;
  std::deque<Block> blocks;  // which own memory and do not move
  std::vector<Warp> warps;
  std::vector<Cluster> clusters;
  int used_fibers;
  std::vector<char*> chunks;  // of stacks

  Context launcher;
  Fiber* current;
  int alive;
  // A fiber is in one of these at most, so that none outgrows the number of fibers.
  std::vector<Fiber*> round, next, held;
  size_t round_size, round_position, next_size, held_size;
  bool progress;
  int idle_rounds;
  std::string failure;

  uint64_t seed = 0, random_state = 0, hold_key = 0;
  Hold hold = Hold::nothing;

  std::mutex one_launch;
};

Machine& machine = []() -> Machine& {
  auto* made = new Machine;  // never destroyed: it may be in use by other threads when the process ends
  if (const char* seed = std::getenv("TPEXT_EMULATION_SEED")) made->seed = std::strtoull(seed, nullptr, 10);
  return *made;
}();

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
uint64_t random_bits() { return mix(machine.random_state += 0x9e3779b97f4a7c15u); }
// 0 <= result < bound
uint64_t draw(uint64_t bound) { return ((random_bits() >> 32) * bound) >> 32; }

void draw_interruption() { until_interruption = static_cast<int64_t>(1 + draw(64)); }

inline void make_runnable(Fiber* fiber) {
  fiber->wait = Wait::none;
  machine.next[machine.next_size++] = fiber;
}

const char* name(Wait wait) {
  switch (wait) {
    case Wait::none: return "running";
    case Wait::block_barrier: return "block_barrier";
    case Wait::warp_barrier: return "warp_barrier";
    case Wait::shuffle: return "shuffle";
    case Wait::shuffle_wide: return "shuffle of 8 bytes";
    case Wait::shuffle_xor: return "shuffle_xor";
    case Wait::shuffle_xor_wide: return "shuffle_xor of 8 bytes";
    case Wait::mma_bfloat16: return "mma of Bfloat16";
    case Wait::mma_float16: return "mma of Float16";
    case Wait::cluster_wait: return "cluster_wait";
    case Wait::spin: return "spin";
    case Wait::ended: return "its end";
  }
  return "";
}

std::string describe(const Fiber& fiber) {
  return "block " + std::to_string(fiber.thread.block) + " thread " + std::to_string(fiber.thread.index);
}

std::string describe(const Shape& shape) {
  std::string text = std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) + " threads";
  if (shape.cluster > 1) text += " in clusters of " + std::to_string(shape.cluster);
  return text;
}

// How many threads are where, with the first of each.
std::string where_threads_are() {
  std::string text;
  constexpr int kinds = static_cast<int>(Wait::ended) + 1;
  std::array<int, kinds> counts{};
  std::array<const Fiber*, kinds> firsts{};
  for (int i = 0; i < machine.used_fibers; ++i) {
    const Fiber& fiber = *machine.fibers[static_cast<size_t>(i)];
    const int kind = static_cast<int>(fiber.wait);
    if (counts[kind]++ == 0) firsts[kind] = &fiber;
  }
  for (int kind = 0; kind < kinds; ++kind) {
    if (counts[kind] == 0) continue;
    text += (text.empty() ? "" : ", ") + std::to_string(counts[kind]) + " at " + name(static_cast<Wait>(kind)) +
            " (first " + describe(*firsts[kind]) + ")";
  }
  return text;
}

[[noreturn]] void abort_launch(const std::string& text) {
  machine.failure = text + "; threads: " + where_threads_are();
  Context stopped;
  stopped.switch_to(machine.launcher);
  __builtin_unreachable();
}
[[noreturn]] void abort_thread(const std::string& text) { abort_launch(describe(*machine.current) + ": " + text); }

void draw_hold() {
  constexpr std::array<Hold, 8> choices{Hold::nothing, Hold::threads, Hold::warps,  Hold::warps,
                                        Hold::warps,   Hold::warps,   Hold::blocks, Hold::blocks};
  const Shape& shape = machine.call.shape;
  const bool one_block = shape.cooperative ? shape.blocks == 1 : shape.cluster == 1;
  machine.hold = choices[draw(one_block ? 6 : 8)];
  machine.hold_key = random_bits();
}
bool holds(const Fiber& fiber) {
  int group = 0;
  switch (machine.hold) {
    case Hold::nothing: return false;
    case Hold::threads: group = fiber.block->first_fiber + fiber.thread.index; break;
    case Hold::warps: group = fiber.warp->first_fiber; break;
    case Hold::blocks: group = fiber.block->first_fiber; break;
  }
  return mix(machine.hold_key ^ static_cast<uint64_t>(group)) & 1;
}

// Some fibers held back for a random number of rounds, the others in random order.
void permute_round() {
  Machine& m = machine;
  if (m.next_size == 0 || !m.progress || draw(8) == 0) {
    std::copy_n(m.held.begin(), m.held_size, m.next.begin() + static_cast<ptrdiff_t>(m.next_size));
    m.next_size += m.held_size;
    m.held_size = 0;
    draw_hold();
  }
  m.round_size = 0;
  for (size_t i = 0; i < m.next_size; ++i) {
    Fiber* fiber = m.next[i];
    if (holds(*fiber)) {
      m.held[m.held_size++] = fiber;
    } else {
      m.round[m.round_size++] = fiber;
    }
  }
  if (m.round_size == 0) {
    std::swap(m.round, m.held);
    std::swap(m.round_size, m.held_size);
  }
  for (size_t i = m.round_size; i > 1; --i) std::swap(m.round[i - 1], m.round[draw(i)]);
}

// False when all threads have ended.
bool new_round() {
  Machine& m = machine;
  if (m.next_size + m.held_size == 0) {
    if (m.alive == 0) return false;
    abort_launch("no thread can go on");
  }
  m.idle_rounds = m.progress ? 0 : m.idle_rounds + 1;
  if (m.idle_rounds > kMostIdleRounds) abort_launch("threads spin for ever");
  if (m.seed != 0) {
    permute_round();
  } else {
    std::swap(m.round, m.next);
    m.round_size = m.next_size;
  }
  m.next_size = 0;
  m.round_position = 0;
  m.progress = false;
  return true;
}

// From the running fiber, or the launcher, to the next fiber; to the launcher at the end.
void switch_from(Context& from) {
  Machine& m = machine;
  if (m.round_position == m.round_size && !new_round()) {
    from.switch_to(m.launcher);
    return;
  }
  Fiber* fiber = m.round[m.round_position++];
  m.current = fiber;
  running = &fiber->thread;
  from.switch_to(fiber->context);
}

void switch_away() { switch_from(machine.current->context); }

void end_thread() {
  Machine& m = machine;
  Fiber& fiber = *m.current;
  Block& block = *fiber.block;
  fiber.wait = Wait::ended;
  if (fiber.arrived_in_cluster) abort_thread("ended between cluster_arrive and cluster_wait");
  if (block.arrived > 0) abort_thread("ended while others of its block wait at block_barrier");
  if (fiber.warp->arrived > 0) {
    abort_thread("ended while others of its warp wait at " + std::string(name(fiber.warp->kind)));
  }
  ++fiber.warp->ended;
  ++block.ended;
  --m.alive;
  m.progress = true;
  // Nobody may touch the shared memory of a block that has ended.
  if (block.ended == m.call.shape.threads && m.call.shape.cluster > 1) block.memory.close();
  switch_away();
}

void run_fiber() {
  for (;;) {
    machine.call.thread(machine.call.call);
    end_thread();
  }
}

// Stacks come in chunks, each stack above an inaccessible page as long as there are not too many, with its fiber at the
// top. Tops have different offsets in their pages, which spreads them over the sets of the caches.
void add_fiber() {
  Machine& m = machine;
  const size_t chunk = m.fibers.size() / kStacksInAChunk, place = m.fibers.size() % kStacksInAChunk;
  if (chunk == m.chunks.size()) m.chunks.push_back(map_pages(kStackBytes * kStacksInAChunk));
  char* stack = m.chunks[chunk] + kStackBytes * place;
  if (m.fibers.size() < kGuardedStacks) protect(stack, page_bytes(), PROT_NONE);
  const size_t top = (kStackBytes - place % 16 * 128 - sizeof(Fiber)) / 64 * 64;
  m.fibers.push_back(new (stack + top) Fiber);
  m.fibers.back()->context.prepare(stack, top, run_fiber);
}

void make_gang(int64_t first_block, int blocks) {
  Machine& m = machine;
  const Shape& shape = m.call.shape;
  const int warps = (shape.threads + kWarp - 1) / kWarp, fibers = blocks * shape.threads;
  while (m.fibers.size() < static_cast<size_t>(fibers)) add_fiber();
  while (m.blocks.size() < static_cast<size_t>(blocks)) m.blocks.emplace_back();
  m.used_fibers = m.alive = fibers;
  m.warps.resize(static_cast<size_t>(blocks * warps));
  m.clusters.resize(static_cast<size_t>(blocks / shape.cluster));
  for (std::vector<Fiber*>* list : {&m.round, &m.next, &m.held}) list->resize(m.fibers.size());
  m.round_size = m.round_position = m.next_size = m.held_size = 0;
  m.progress = true;
  m.idle_rounds = 0;

  for (int b = 0; b < blocks; ++b) {
    Block& block = m.blocks[static_cast<size_t>(b)];
    block.arrived = block.ended = 0;
    block.first_fiber = b * shape.threads;
    block.cluster = &m.clusters[static_cast<size_t>(b / shape.cluster)];
    *block.cluster = {.arrived = 0, .phase = 0, .first_block = b / shape.cluster * shape.cluster};
    char* shared = block.memory.prepare(static_cast<size_t>(shape.shared_bytes));
    for (int t = 0; t < shape.threads; ++t) {
      Fiber& fiber = *m.fibers[static_cast<size_t>(block.first_fiber + t)];
      fiber.thread = {.index = t, .block = static_cast<int>(first_block + b), .shared = shared};
      fiber.block = &block;
      fiber.warp = &m.warps[static_cast<size_t>(b * warps + t / kWarp)];
      if (t % kWarp == 0) {
        fiber.warp->lanes = std::min(kWarp, shape.threads - t);
        fiber.warp->arrived = fiber.warp->ended = fiber.warp->set = 0;
        fiber.warp->first_fiber = block.first_fiber + t;
      }
      fiber.arrived_in_cluster = false;
      make_runnable(&fiber);
    }
  }
}

// The last lane to come: the others wait.
bool last_of_warp(Wait kind) {
  Fiber& fiber = *machine.current;
  Warp& warp = *fiber.warp;
  if (warp.lanes < kWarp || warp.ended > 0) {
    abort_thread(std::string(name(kind)) + " without all 32 lanes of the warp");
  }
  if (warp.arrived > 0 && warp.kind != kind) {
    abort_thread(std::string(name(kind)) + " while others of its warp wait at " + name(warp.kind));
  }
  warp.kind = kind;
  if (++warp.arrived < kWarp) return false;
  warp.arrived = 0;
  warp.set ^= 1;
  return true;
}

void release(int first_fiber, int count) {
  Fiber* const* fibers = machine.fibers.data() + first_fiber;
  for (int i = 0; i < count; ++i) make_runnable(fibers[i]);
}

// Until the fiber is released, and then its turn comes: for one that completed a collective, too.
void wait() {
  machine.progress = true;
  switch_away();
}

template <class T>
void multiply_warp(const Warp& warp, int set) {
  const auto low = [](uint32_t pair) { return to_compute(T{static_cast<uint16_t>(pair)}); };
  const auto high = [](uint32_t pair) { return to_compute(T{static_cast<uint16_t>(pair >> 16)}); };
  std::array<const Operands*, kWarp> operands;
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto address = static_cast<uintptr_t>(warp.values[set][lane]);
    operands[static_cast<size_t>(lane)] = reinterpret_cast<const Operands*>(address);
    const Operands& of = *operands[static_cast<size_t>(lane)];
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, k = 2 * q + i / 2 * 8;
      a[row][k] = low(of.a[i]);
      a[row][k + 1] = high(of.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * q + 8 * i][g] = low(of.b[i]);
      b[2 * q + 8 * i + 1][g] = high(of.b[i]);
    }
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * q + i % 2] = of.c[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) operands[static_cast<size_t>(lane)]->c[i] = c[g + i / 2 * 8][2 * q + i % 2];
  }
}

Limits emulated_limits{.capability = 90, .multiprocessors = 132, .shared_memory = 232448, .cooperative = true};

// What the hardware would refuse, or an empty text.
std::string refusal(const Shape& shape) {
  const Limits& l = emulated_limits;
  if (shape.threads < 1 || shape.threads > kMostThreads) return "threads must be 1 to 1024";
  if (shape.shared_bytes < 0 || shape.shared_bytes > l.shared_memory) {
    return "shared memory of " + std::to_string(shape.shared_bytes) + " bytes where a block can have " +
           std::to_string(l.shared_memory);
  }
  if (shape.cluster < 1 || shape.cluster > kLargestCluster) return "clusters must have 1 to 16 blocks";
  if (shape.cluster > 1 && l.capability < 90) {
    return "clusters need capability 90, here " + std::to_string(l.capability);
  }
  return {};
}

}  // namespace

void interrupt() {
  draw_interruption();
  Fiber& fiber = *machine.current;
  const Wait before = fiber.wait;
  if (before != Wait::spin) machine.progress = true;
  make_runnable(&fiber);
  fiber.wait = before;
  switch_away();
}

void made_progress() {
  machine.current->wait = Wait::none;
  machine.progress = true;
}

uint64_t exchange(Wait kind, uint64_t bits, int source) {
  may_interrupt();
  Fiber& fiber = *machine.current;
  Warp& warp = *fiber.warp;
  if (source < 0 || source >= kWarp) abort_thread(std::string(name(kind)) + " from lane " + std::to_string(source));
  const int set = warp.set;
  warp.values[set][fiber.thread.index % kWarp] = bits;
  fiber.wait = kind;
  if (last_of_warp(kind)) release(warp.first_fiber, kWarp);
  wait();
  return warp.values[set][source];
}

void multiply(Wait kind, float* c, const uint32_t* a, const uint32_t* b) {
  may_interrupt();
  Fiber& fiber = *machine.current;
  Warp& warp = *fiber.warp;
  const Operands operands{.c = c, .a = a, .b = b};
  const int set = warp.set;
  warp.values[set][fiber.thread.index % kWarp] = reinterpret_cast<uintptr_t>(&operands);
  fiber.wait = kind;
  if (last_of_warp(kind)) {
    if (kind == Wait::mma_bfloat16) {
      multiply_warp<Bfloat16>(warp, set);
    } else {
      multiply_warp<Float16>(warp, set);
    }
    release(warp.first_fiber, kWarp);
  }
  wait();
}

void* in_cluster(void* shared, int rank) {
  may_interrupt();
  const Fiber& fiber = *machine.current;
  const Shape& shape = machine.call.shape;
  const ptrdiff_t offset = static_cast<char*>(shared) - fiber.thread.shared;
  if (offset < 0 || offset > shape.shared_bytes) {
    abort_thread("in_cluster of an address outside its block's shared memory");
  }
  if (rank < 0 || rank >= shape.cluster) {
    abort_thread("in_cluster of rank " + std::to_string(rank) + " in a cluster of " + std::to_string(shape.cluster));
  }
  const Block& block = machine.blocks[static_cast<size_t>(fiber.block->cluster->first_block + rank)];
  if (block.ended == shape.threads) abort_thread("in_cluster of rank " + std::to_string(rank) + ", which has ended");
  return machine.fibers[static_cast<size_t>(block.first_fiber)]->thread.shared + offset;
}

void launch(void (*thread)(const void*), const void* call, const Shape& shape, const Queue& queue) {
  Machine& m = machine;
  const std::string what = "launch of " + describe(shape) + " on device " + std::to_string(queue.device) + ": ";
  if (shape.blocks == 0) return;
  if (shape.blocks < 0 || shape.blocks > std::numeric_limits<int32_t>::max())
    throw_error(what + "a grid has 0 to 2147483647 blocks");
  if (const std::string why = refusal(shape); !why.empty()) throw_error(what + why);
  if (shape.blocks % shape.cluster != 0) throw_error(what + "the grid must be whole clusters");
  if (shape.cooperative) {
    const int64_t possible = static_cast<int64_t>(resident(shape, queue.device)) * shape.cluster;
    if (!emulated_limits.cooperative) throw_error(what + "the device has no cooperative launches");
    if (shape.blocks > possible) {
      throw_error(what + "of a cooperative grid " + std::to_string(possible) + " blocks fit");
    }
  }

  const std::lock_guard<std::mutex> lock(m.one_launch);
  m.call = {.thread = thread, .call = call, .shape = shape};
  m.random_state = mix(m.seed);
  if (m.seed != 0) {
    draw_hold();
    draw_interruption();
  } else {
    until_interruption = std::numeric_limits<int64_t>::max();
  }
  const int together = shape.cooperative ? static_cast<int>(shape.blocks) : shape.cluster;
  std::vector<int64_t> gangs(static_cast<size_t>(shape.blocks / together));
  std::iota(gangs.begin(), gangs.end(), 0);
  if (m.seed != 0) {
    for (size_t i = gangs.size(); i > 1; --i) std::swap(gangs[i - 1], gangs[draw(i)]);
  }
  for (const int64_t gang : gangs) {
    make_gang(gang * together, together);
    switch_from(m.launcher);
    if (m.failure.empty()) continue;
    const std::string failure = std::exchange(m.failure, {});
    // The fibers stand where they were stopped: they are of no more use.
    m.fibers.clear();
    for (char* chunk : std::exchange(m.chunks, {})) munmap(chunk, kStackBytes * kStacksInAChunk);
    throw_error(what + failure);
  }
}

int resident(const Shape& shape, int) {
  return refusal(shape).empty() ? emulated_limits.multiprocessors / shape.cluster : 0;
}

}  // namespace detail

using namespace detail;

void set_emulation_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(machine.one_launch);
  machine.seed = seed;
}

void set_emulated_limits(const Limits& limits) {
  const std::lock_guard<std::mutex> lock(machine.one_launch);
  emulated_limits = limits;
}

const Limits& limits(int) { return emulated_limits; }

void block_barrier() {
  may_interrupt();
  Fiber& fiber = *machine.current;
  Block& block = *fiber.block;
  if (block.ended > 0) abort_thread("block_barrier after other threads of its block ended");
  fiber.wait = Wait::block_barrier;
  if (++block.arrived == machine.call.shape.threads) {
    block.arrived = 0;
    release(block.first_fiber, machine.call.shape.threads);
  }
  wait();
}

void warp_barrier() {
  may_interrupt();
  machine.current->wait = Wait::warp_barrier;
  if (last_of_warp(Wait::warp_barrier)) release(machine.current->warp->first_fiber, kWarp);
  wait();
}

// As on the hardware, nothing before sm_90.
void cluster_arrive() {
  may_interrupt();
  if (emulated_limits.capability < 90) return;
  const Shape& shape = machine.call.shape;
  Fiber& fiber = *machine.current;
  Cluster& cluster = *fiber.block->cluster;
  if (fiber.arrived_in_cluster) abort_thread("a second cluster_arrive without cluster_wait");
  fiber.arrived_in_cluster = true;
  fiber.awaited_phase = cluster.phase + 1;
  machine.progress = true;
  if (++cluster.arrived < shape.cluster * shape.threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  const int first = cluster.first_block * shape.threads;
  for (int i = first; i < first + shape.cluster * shape.threads; ++i) {
    Fiber& other = *machine.fibers[static_cast<size_t>(i)];
    if (other.wait == Wait::cluster_wait) make_runnable(&other);
  }
}

void cluster_wait() {
  may_interrupt();
  if (emulated_limits.capability < 90) return;
  Fiber& fiber = *machine.current;
  if (!fiber.arrived_in_cluster) abort_thread("cluster_wait without cluster_arrive");
  fiber.arrived_in_cluster = false;
  if (fiber.block->cluster->phase == fiber.awaited_phase) return;
  fiber.wait = Wait::cluster_wait;
  wait();
}

void spin() {
  make_runnable(machine.current);
  machine.current->wait = Wait::spin;
  switch_away();
}

}  // namespace tpext::cuda
