#include "cpu/processors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace tpext::cpu {

namespace {

// Both numbers, in microseconds; false where there is no quota.
bool read_quota(const std::string& folder, bool unified, double& quota, double& period) {
  // "max 100000" without a quota, where no number can be read, and -1 in version 1.
  if (unified) return static_cast<bool>(std::ifstream(folder + "/cpu.max") >> quota >> period);
  return std::ifstream(folder + "/cpu.cfs_quota_us") >> quota && std::ifstream(folder + "/cpu.cfs_period_us") >> period;
}

}  // namespace

int quota_processors(const char* membership, const char* mount, int otherwise) {
  int least = otherwise;
  // Lines "number:controllers:/path"; version 2 has number 0 and no controllers.
  std::ifstream groups(membership);
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
    // The quota of each group above holds too. Within a container the path may be the host's, of which it sees the end.
    std::string path = line.substr(second + 1);
    while (true) {
      double quota = 0, period = 0;
      if (read_quota(std::string(mount) + (unified ? "" : "/cpu") + path, unified, quota, period) && quota > 0 &&
          period > 0)
        least = std::min(least, static_cast<int>(std::max(1.0, std::min(quota / period, 1e6))));
      if (path.empty() || path == "/") break;
      path.erase(path.rfind('/'));
    }
  }
  return least;
}

int usable_processors() {
  static const int quota = quota_processors("/proc/self/cgroup", "/sys/fs/cgroup", std::numeric_limits<int>::max());
#ifdef _OPENMP
  return std::min(quota, omp_get_num_procs());
#else
  return 1;
#endif
}

}  // namespace tpext::cpu
