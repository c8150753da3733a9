// What the kernels call of OpenMP's runtime (GCC's libgomp), on the threads and barriers of the C++ library:
// ThreadSanitizer follows those, and does not see how libgomp's threads wait for one another. For CMake's
// TPEXT_SANITIZERS=thread.
//
// The environment variable TPEXT_UNORDERED takes an order away, so that tests show that its absence is noticed:
//     barriers   nobody waits at OpenMP's barriers, nor at the end of its loops
//     teams      who leaves the barrier of a team (csrc/cpu/sweep.h) has not seen what the others wrote before it
#include <atomic>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

bool without(const char* order) {
  const char* const unordered = std::getenv("TPEXT_UNORDERED");
  return unordered != nullptr && std::strcmp(unordered, order) == 0;
}
const bool without_barriers = without("barriers"), without_teams = without("teams");

// Loops of dynamic schedule in one parallel region.
constexpr size_t kMostLoops = 4096;

struct Team {
  explicit Team(int size) : size(size), meeting(size) {}
  const int size;
  std::barrier<> meeting;
  // Of each loop, the chunks that are taken. Without an order: what a thread takes must not tell it of others' work.
  std::atomic<long> taken[kMostLoops] = {};
};

struct Loop {
  size_t number = 0;  // in the region
  long begin, end, step, chunk;
};

// Tests look at it: a region of one thread has no race.
struct Report {
  ~Report() { std::fprintf(stderr, "openmp_stand_in: up to %d threads\n", most); }
  int most = 1;
} report;

thread_local Team* team = nullptr;
thread_local int number = 0;
thread_local Loop loop;

void meet() {
  if (team != nullptr && !without_barriers) team->meeting.arrive_and_wait();
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned wanted, unsigned) {
  Team own(static_cast<int>(wanted));
  if (own.size > report.most) report.most = own.size;
  const auto run = [&](int as) {
    team = &own;
    number = as;
    loop = {};
    body(data);
    team = nullptr;
    number = 0;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < own.size; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
}

void GOMP_barrier() { meet(); }

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  const long first =
      loop.begin + loop.step * loop.chunk * team->taken[loop.number].fetch_add(1, std::memory_order_relaxed);
  if (first >= loop.end) return false;
  *begin = first;
  *end = first + loop.step * loop.chunk < loop.end ? first + loop.step * loop.chunk : loop.end;
  return true;
}
bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long chunk, long* begin, long* end) {
  loop = {loop.number + 1, first, last, step, chunk};
  if (loop.number == kMostLoops) {
    std::fputs("openmp_stand_in: too many loops\n", stderr);
    std::abort();
  }
  return GOMP_loop_nonmonotonic_dynamic_next(begin, end);
}
void GOMP_loop_end() { meet(); }

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team == nullptr ? 1 : team->size; }
// Teams have as many members as there are processors for.
int omp_get_num_procs() { return 64; }

int __real___tsan_atomic32_load(const volatile int* from, int order);
int __wrap___tsan_atomic32_load(const volatile int* from, int order) {
  return __real___tsan_atomic32_load(from, without_teams ? __ATOMIC_RELAXED : order);
}
}
