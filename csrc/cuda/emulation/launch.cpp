// The emulated side of cuda/launch.h: a device's limits, and launches.
#include "cuda/launch.h"

#include <cstddef>
#include <limits>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emulation/machine.h"

namespace tpext::cuda {

using namespace emulation;

namespace {

constexpr int kMostThreads = 1024, kLargestCluster = 16;

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

std::string describe(const Shape& shape) {
  std::string text = std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) + " threads";
  if (shape.cluster > 1) text += " in clusters of " + std::to_string(shape.cluster);
  return text;
}

}  // namespace

namespace detail {

void launch(void (*thread)(const void*), const void* call, const Shape& shape, const Queue& queue) {
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

  const std::lock_guard<std::mutex> lock(machine.one_launch);
  begin_launch({.thread = thread, .call = call, .shape = shape});
  const int together = shape.cooperative ? static_cast<int>(shape.blocks) : shape.cluster;
  std::vector<int64_t> gangs(static_cast<size_t>(shape.blocks / together));
  std::iota(gangs.begin(), gangs.end(), 0);
  if (machine.seed != 0) {
    for (size_t i = gangs.size(); i > 1; --i) std::swap(gangs[i - 1], gangs[draw(i)]);
  }
  for (const int64_t gang : gangs) {
    const std::string failure = run_gang(gang * together, together);
    if (!failure.empty()) throw_error(what + failure);
  }
}

int resident(const Shape& shape, int) {
  return refusal(shape).empty() ? emulated_limits.multiprocessors / shape.cluster : 0;
}

}  // namespace detail

void set_emulation_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(machine.one_launch);
  machine.seed = seed;
}

void set_emulated_limits(const Limits& limits) {
  const std::lock_guard<std::mutex> lock(machine.one_launch);
  emulated_limits = limits;
}

const Limits& limits(int) { return emulated_limits; }

}  // namespace tpext::cuda
