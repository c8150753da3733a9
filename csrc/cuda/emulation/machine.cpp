#include "cuda/emulation/machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <new>
#include <utility>

namespace tpext::cuda {
namespace detail {

const Thread* running = nullptr;
int64_t until_interruption = std::numeric_limits<int64_t>::max();

}  // namespace detail

namespace emulation {

Machine& machine = []() -> Machine& {
  auto* made = new Machine;  // never destroyed: it may be in use by other threads when the process ends
  if (const char* seed = std::getenv("TPEXT_EMULATION_SEED")) made->seed = std::strtoull(seed, nullptr, 10);
  return *made;
}();

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kGuardedStacks = 8192;  // the kernel allows a process some 65000 mappings
constexpr int kStacksInAChunk = 128;
constexpr int kMostIdleRounds = 10000;  // after which threads that only spin count as stuck

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
uint64_t random_bits() { return mix(machine.random_state += 0x9e3779b97f4a7c15u); }

void draw_interruption() { detail::until_interruption = static_cast<int64_t>(1 + draw(64)); }

std::string describe(const Fiber& fiber) {
  return "block " + std::to_string(fiber.thread.block) + " thread " + std::to_string(fiber.thread.index);
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
  detail::running = &fiber->thread;
  from.switch_to(fiber->context);
}

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

}  // namespace

uint64_t draw(uint64_t bound) { return ((random_bits() >> 32) * bound) >> 32; }

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

void abort_thread(const std::string& text) { abort_launch(describe(*machine.current) + ": " + text); }

void switch_away() { switch_from(machine.current->context); }

void release(int first_fiber, int count) {
  Fiber* const* fibers = machine.fibers.data() + first_fiber;
  for (int i = 0; i < count; ++i) make_runnable(fibers[i]);
}

void wait() {
  machine.progress = true;
  switch_away();
}

void begin_launch(const Call& call) {
  machine.call = call;
  machine.random_state = mix(machine.seed);
  if (machine.seed != 0) {
    draw_hold();
    draw_interruption();
  } else {
    detail::until_interruption = std::numeric_limits<int64_t>::max();
  }
}

std::string run_gang(int64_t first_block, int blocks) {
  Machine& m = machine;
  make_gang(first_block, blocks);
  switch_from(m.launcher);
  std::string failure = std::exchange(m.failure, {});
  if (!failure.empty()) {
    // The fibers stand where they were stopped: they are of no more use.
    m.fibers.clear();
    for (char* chunk : std::exchange(m.chunks, {})) munmap(chunk, kStackBytes * kStacksInAChunk);
  }
  return failure;
}

}  // namespace emulation

namespace detail {

using namespace emulation;

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

}  // namespace detail
}  // namespace tpext::cuda
