// How many threads can run at the same time.
#pragma once

namespace tpext::cpu {

// Processors that the quotas of a Linux control group leave, at least 1, or `otherwise` where it has none. `membership`
// is a process's list of its groups and `mount` the folder where these stand, /proc/self/cgroup and /sys/fs/cgroup; in
// versions 1 and 2.
int quota_processors(const char* membership, const char* mount, int otherwise);

// For the calling thread: those of its affinity mask, and within the quota that the process had when this was first
// asked.
int usable_processors();

}  // namespace tpext::cpu
