// What the recurrent sweeps share: the split into threads, row tiles and row blocks, the order of the steps, and the
// state of a row at a step.
//
// Rows (a member of the stack and a batch row) are independent through time: each thread takes a range of rows through
// all steps, tile by tile, and never waits for another within a sweep; only the packing of the weights before it is
// shared. Where there are fewer rows than threads and the matrices are large, a team of threads takes a row together:
// each computes some of its columns and all meet at a barrier after every step. A team has no more members than there
// are processors for it, and dissolves when its members wait for one another longer than they work: the first goes on
// alone. Every element is computed by the same operations in the same order whatever its tile, thread, team or
// neighbours.
#pragma once

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#elif defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

#include "core/rnn.h"
#include "cpu/microkernel.h"
#include "cpu/processors.h"
#include "cpu/threads.h"

namespace tpext::cpu::TPEXT_CAPABILITY {
namespace {

// Rows carried through time together: a state tile of 48 x H stays in the cache while the packed weights pass by.
constexpr int kTileRows = 48;
static_assert(kTileRows % kMaxRows == 0);
constexpr int kTileBlocks = kTileRows / kMaxRows + 1;

// [S] packed matrices W or W', the latter optionally below an input's weights and bias, whose products start the sums:
// M = [U'; b; W']. Of several gates, [G H, H], W alone, with the gates in a given order. Knows whether each is finite:
// a product with a zero row is skipped only if it is (0 * inf is NaN).
template <class T>
class PackedStack {
 public:
  PackedStack(const T* weight, bool transposed, const RnnSizes& sizes, const T* weight_ih = nullptr, int64_t inputs = 0,
              const T* bias = nullptr)
      : PackedStack(weight, transposed, sizes, weight_ih, inputs, bias, kOneBlock) {}
  PackedStack(const T* weight, const RnnSizes& sizes, const DeltaBlocks& blocks)
      : PackedStack(weight, false, sizes, nullptr, 0, nullptr, blocks) {}

 private:
  PackedStack(const T* weight, bool transposed, const RnnSizes& sizes, const T* weight_ih, int64_t inputs,
              const T* bias, const DeltaBlocks& blocks)
      : weight_(weight),
        weight_ih_(weight_ih),
        bias_(bias),
        transposed_(transposed),
        stack_(weight == nullptr ? 0 : sizes.stack),
        hidden_(sizes.hidden),
        inputs_(weight_ih == nullptr ? 0 : inputs),
        blocks_(blocks),
        depth_(inputs_ + (bias == nullptr ? 0 : 1) + blocks.gates * hidden_),
        panels_(panel_count<T>(sizes.hidden)),
        packed_(stack_ * panels_ * panel_stride()),
        finite_(stack_ * panels_) {}

 public:
  // To be called by every thread of a parallel region: shares the panels out and waits until all are packed.
  void pack() {
    const int64_t items = stack_ * panels_;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; ++i) {
      const int64_t member = i / panels_, panel = i % panels_;
      T* packed = packed_.get() + i * panel_stride();
      bool finite = true;
      if (inputs_ != 0)
        finite = pack_panel(weight_ih_ + member * hidden_ * inputs_, 1, inputs_, inputs_, hidden_, panel, packed);
      packed += inputs_ * kLanes<T>;
      if (bias_ != nullptr) {
        finite &= pack_panel(bias_ + member * hidden_, 0, 1, 1, hidden_, panel, packed);
        packed += kLanes<T>;
      }
      const int64_t row_stride = transposed_ ? 1 : hidden_, column_stride = transposed_ ? hidden_ : 1;
      for (int block = 0; block < blocks_.count; ++block) {
        if (blocks_.of_state[block] < 0) continue;
        const T* const weight = weight_ + (member * blocks_.gates + blocks_.of_state[block]) * hidden_ * hidden_;
        finite &= pack_panel(weight, row_stride, column_stride, hidden_, hidden_, panel, packed);
        packed += hidden_ * kLanes<T>;
      }
      finite_.get()[i] = finite;
    }
  }

  int64_t depth() const { return depth_; }
  int64_t panel_stride() const { return depth_ * kLanes<T>; }
  const T* panel(int64_t member, int64_t index) const {
    return packed_.get() + (member * panels_ + index) * panel_stride();
  }
  bool finite(int64_t member) const {
    bool all = true;
    for (int64_t p = 0; p < panels_; ++p) all = all && finite_.get()[member * panels_ + p];
    return all;
  }
  explicit operator bool() const { return stack_ != 0; }

 private:
  const T *weight_, *weight_ih_, *bias_;
  bool transposed_;
  int64_t stack_, hidden_, inputs_;
  DeltaBlocks blocks_;
  int64_t depth_, panels_;
  Buffer<T> packed_;
  Buffer<bool> finite_;
};

// Calls that go without teams after one has dissolved, and those left: what took the processors will be there for a
// while.
constexpr int kRest = 16;
int resting = 0;

// Those that the next call may form teams on; where it has one of its `shares` for every thread it needs none.
inline int team_processors(int64_t shares, int threads) {
  if (shares >= threads) return 1;
  const int rest = __atomic_load_n(&resting, __ATOMIC_RELAXED);
  if (rest <= 0) return usable_processors();
  __atomic_store_n(&resting, rest - 1, __ATOMIC_RELAXED);
  return 1;
}

// A meeting point for the threads of a team. They meet once a step of some microseconds, so they spin: a sleep and a
// wake take longer than the step. Who has spun for as long as many steps take waits for a thread that has no processor,
// and sleeps, to leave it its own. Where that happens often the team is worth less than one thread.
class alignas(64) Barrier {
 public:
  // Spins for so many pauses before it sleeps. Returns whether the team goes on together: if not, its first thread is
  // to go on alone, and the others to leave.
  bool wait(int threads, int pauses) {
    if (threads == 1) return true;
    const uint32_t round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
    const int arrived = __atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL);
    if ((arrived & ~kSleeper) == threads) {
      const bool slept = (arrived & kSleeper) != 0;
      stalls_ += slept;
      const bool together = stalls_ <= kPatience + round / kSpan;
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round_, (round + 1) | (together ? 0 : kDissolved), __ATOMIC_RELEASE);
      if (slept) wake();
      if (!together) __atomic_store_n(&resting, kRest, __ATOMIC_RELAXED);
      return together;
    }
    uint32_t now = 0;
    for (; (now = __atomic_load_n(&round_, __ATOMIC_ACQUIRE)) == round; --pauses) {
      if (pauses > 0)
        pause();
      else
        sleep(round);
    }
    return (now & kDissolved) == 0;
  }

 private:
  // Rounds in which somebody slept that a team forgives, and the rounds that earn it one more.
  static constexpr uint32_t kPatience = 2, kSpan = 32;
  // Beside the count of rounds; beside that of the arrived: somebody sleeps.
  static constexpr uint32_t kDissolved = uint32_t{1} << 31;
  static constexpr int kSleeper = 1 << 30;

  static void pause() {
#if defined(__SSE2__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }

  void sleep(uint32_t round) {
    __atomic_fetch_or(&arrived_, kSleeper, __ATOMIC_RELAXED);
#if defined(__linux__)
    // The round may end without the last one's noticing who lies down that moment: to order the two would cost every
    // round. Hence the limit.
    const struct timespec limit = {0, 1000000};
    (void)syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, &limit, nullptr, 0);
#elif defined(__unix__) || defined(__APPLE__)
    (void)round;
    sched_yield();
#endif
  }

  void wake() {
#if defined(__linux__)
    (void)syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
  }

  // All begin as zero, by Buffer; of one cache line, as every round moves it from thread to thread.
  uint32_t round_;
  int arrived_;
  uint32_t stalls_;  // of the last one to arrive
};

// How the threads of a call share its rows: `teams` of `members` threads each, with one thread a team as a rule.
struct Teams {
  int64_t teams;
  int members;
};

// Operations of a step that pay for a team of two with its barrier of some 0.1 microseconds, and half as many for each
// further thread. Measured on two threads: one product a step breaks even at H = 96 and gains a third at 128, two
// products gain a third at 96 (Zen 5; H = 512: 2.2 to 2.6 times as fast, where half of the weights fit a core's cache).
constexpr double kTeamOperations = 36e3;

inline double step_operations(const RnnSizes& sizes, int products) {
  return 2.0 * static_cast<double>(sizes.hidden * (sizes.hidden * products + 16));
}

// What the members of a team share: panels, the last two together where they overlap, so that no two threads write to
// the same place.
template <class T>
inline int64_t panel_units(int64_t hidden) {
  const int64_t panels = panel_count<T>(hidden);
  return panels > 1 && hidden % kLanes<T> != 0 ? panels - 1 : panels;
}

// Of `threads`, on so many processors.
template <class T>
inline Teams share(const RnnSizes& sizes, int products, int threads, int processors) {
  const int64_t rows = sizes.stack * sizes.batch, units = panel_units<T>(sizes.hidden);
  if (rows >= threads || rows == 0) return {threads, 1};
  const int64_t most = (threads < processors ? threads : processors) / rows;
  double members = step_operations(sizes, products) / (kTeamOperations / 2);
  if (members > static_cast<double>(most)) members = static_cast<double>(most);
  if (members > static_cast<double>(units)) members = static_cast<double>(units);
  return {rows, members < 2 ? 1 : static_cast<int>(members)};
}

// Neighbouring rows of one member, taken through all steps together.
struct Tile {
  int64_t member, row, rows;
  int64_t blocks;
  int part, parts;  // this thread's place in its team
  int pauses;       // before it sleeps at the barrier
  Barrier* barrier;

  int64_t block_begin(int64_t block) const { return part_begin(rows, blocks, block); }
  // The same for the first thread of a team that dissolved.
  Tile alone() const { return {member, row, rows, blocks, 0, 1, 0, barrier}; }
  // Returns whether the team goes on together.
  bool meet() const { return barrier->wait(parts, pauses); }
};

// Threads worth waking: each gets at least 10^6 operations, some 10 microseconds.
template <class T>
inline int useful_threads(const RnnSizes& sizes, int products, int threads, int processors) {
  const double operations =
      static_cast<double>(sizes.stack * sizes.time * sizes.batch) * step_operations(sizes, products);
  double most = operations / 1e6 + 1;
  const Teams teams = share<T>(sizes, products, threads, processors);
  const double places = static_cast<double>(teams.teams * teams.members);
  most = most < places ? most : places;
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

// Calls visit(tile, team) for the tiles of one thread's share of the S * B rows. `barriers` has one a team;
// `processors` are those that useful_threads was told of.
template <class T, class Visit>
inline void for_each_tile(const RnnSizes& sizes, int products, int processors, Barrier* barriers, const Visit& visit) {
  const Teams teams = share<T>(sizes, products, thread_count(), processors);
  const int64_t team = thread_index() / teams.members;
  const int part = thread_index() % teams.members;
  if (team >= teams.teams) return;
  // Some 10 to 50 microseconds, and longer than a step takes whose weights come from memory.
  const double step = step_operations(sizes, products) / teams.members;
  const int pauses = 1000 + (step < 1e8 ? static_cast<int>(step / 100) : 1000000);
  int64_t row = part_begin(sizes.stack * sizes.batch, teams.teams, team);
  const int64_t end = part_begin(sizes.stack * sizes.batch, teams.teams, team + 1);
  while (row < end) {
    const int64_t member = row / sizes.batch;
    const int64_t member_end = (member + 1) * sizes.batch < end ? (member + 1) * sizes.batch : end;
    const int64_t tiles = ceil_div(member_end - row, kTileRows);
    const int64_t rows = part_begin(member_end - row, tiles, 1);
    visit(Tile{member, row - member * sizes.batch, rows, ceil_div(rows, kMaxRows), part, teams.members, pauses,
               barriers + team},
          team);
    row += rows;
  }
}

inline int64_t valid_steps(const RnnSizes& sizes, int64_t row) {
  if (sizes.lengths == nullptr) return sizes.time;
  const int64_t length = sizes.lengths[row];
  return length < 0 ? 0 : length > sizes.time ? sizes.time : length;
}

// The groups of neighbouring panels that one thread computes, each of `most` or as many as a block of rows leaves
// registers for.
template <class T>
class PanelGroups {
 public:
  PanelGroups(int64_t hidden, const Tile& tile)
      : PanelGroups(hidden, tile, max_panels(static_cast<int>(ceil_div(tile.rows, tile.blocks)))) {}
  PanelGroups(int64_t hidden, const Tile& tile, int64_t most)
      : first_(part_begin(panel_units<T>(hidden), tile.parts, tile.part)),
        panels_((tile.part + 1 == tile.parts ? panel_count<T>(hidden)
                                             : part_begin(panel_units<T>(hidden), tile.parts, tile.part + 1)) -
                first_),
        groups_(ceil_div(panels_, most)) {}
  int64_t count() const { return groups_; }
  int64_t begin(int64_t group) const { return first_ + part_begin(panels_, groups_, group); }

 private:
  int64_t first_, panels_, groups_;
};

}  // namespace
}  // namespace tpext::cpu::TPEXT_CAPABILITY
