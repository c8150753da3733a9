// What threads do together: barriers, shuffles, matrix products of a warp, clusters. Each checks that all take part.
#include <array>
#include <cstddef>
#include <string>

#include "cuda/emulation/machine.h"

namespace tpext::cuda {
namespace emulation {
namespace {

struct Operands {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

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

}  // namespace
}  // namespace emulation

using namespace emulation;

namespace detail {

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

}  // namespace detail

using detail::may_interrupt;

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
  if (limits(0).capability < 90) return;
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
  if (limits(0).capability < 90) return;
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
