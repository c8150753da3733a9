// The threads of a launch as fibers, and their schedule.
//
// Fibers switch straight from one to the next. A fiber runs one thread of a launch after another and is kept between
// launches. A round takes every runnable fiber once; those that become runnable meanwhile make up the next round. One
// launch runs at a time, whichever host thread asks for it.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/emulation.h"
#include "cuda/emulation/context.h"
#include "cuda/emulation/memory.h"
#include "cuda/launch.h"

namespace tpext::cuda::emulation {

using detail::Thread;
using detail::Wait;

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

extern Machine& machine;

// 0 <= result < bound, drawn by the seed.
uint64_t draw(uint64_t bound);

const char* name(Wait wait);
// Ends the launch, whose failure is the text, with the running thread and where all others are.
[[noreturn]] void abort_thread(const std::string& text);

inline void make_runnable(Fiber* fiber) {
  fiber->wait = Wait::none;
  machine.next[machine.next_size++] = fiber;
}
void release(int first_fiber, int count);
// From the running fiber to the next.
void switch_away();
// Until the fiber is released, and then its turn comes: for one that completed a collective, too.
void wait();

// Readies the schedule for a launch. One host thread is here until its launch's last gang has run: machine.one_launch.
void begin_launch(const Call& call);
// Runs some blocks together. Returns what they failed of, an empty text if they did not.
std::string run_gang(int64_t first_block, int blocks);

}  // namespace tpext::cuda::emulation
