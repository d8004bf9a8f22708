#include "base/cpu_count.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#include "base/thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

namespace qwen2vl {
namespace {

// cpu.max holds "QUOTA PERIOD" or "max PERIOD"; version 1 has a file for each, and -1 for no quota.
std::optional<double> read_quota(const std::string& folder) {
  double quota = 0, period = 0;
  if (std::ifstream(folder + "/cpu.max") >> quota >> period && quota > 0 && period > 0) return quota / period;
  if (std::ifstream(folder + "/cpu.cfs_quota_us") >> quota && quota > 0 &&
      std::ifstream(folder + "/cpu.cfs_period_us") >> period && period > 0) {
    return quota / period;
  }
  return std::nullopt;
}

bool lists_cpu_controller(const std::string& controllers) {
  std::istringstream names(controllers);
  for (std::string name; std::getline(names, name, ',');) {
    if (name == "cpu") return true;
  }
  return false;
}

[[maybe_unused]] int logical_processors() {
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

#if defined(__linux__)

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  // The kernel refuses a mask smaller than its own, whose size it does not tell.
  for (int capacity = CPU_SETSIZE; capacity <= (1 << 20); capacity *= 2) {
    cpu_set_t* mask = CPU_ALLOC(static_cast<size_t>(capacity));
    if (mask == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(capacity));
    const bool known = sched_getaffinity(0, bytes, mask) == 0;
    for (int cpu = 0; known && cpu < capacity; ++cpu) {
      if (CPU_ISSET_S(static_cast<size_t>(cpu), bytes, mask)) cpus.push_back(cpu);
    }
    CPU_FREE(mask);
    if (known) break;
  }
  return cpus;
}

#endif

}  // namespace

int count_physical_cores(std::span<const int> cpus, const std::string& root) {
  std::set<int> cores;  // each known by its first sibling
  for (const int cpu : cpus) {
    int first = cpu;
    std::ifstream list(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");  // "0,64" or "0-1"
    if (!(list >> first)) first = cpu;
    cores.insert(first);
  }
  return static_cast<int>(cores.size());
}

std::optional<int> cgroup_cpu_limit(const std::string& root) {
  std::optional<double> limit;
  std::ifstream groups(root + "/proc/self/cgroup");  // lines "ID:CONTROLLERS:PATH"; version 2 is "0::PATH"
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !lists_cpu_controller(controllers)) continue;
    const std::string mount = root + "/sys/fs/cgroup" + (controllers.empty() ? "" : "/" + controllers);
    // Inside a container the path may be the host's and not exist below the mount; the walk up ends at the
    // mount, which is then the container's own group.
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      if (path == "/") path.clear();
      if (const auto quota = read_quota(mount + path)) limit = std::min(limit.value_or(*quota), *quota);
      if (path.empty() || path.front() != '/') break;
    }
  }
  if (!limit) return std::nullopt;
  return static_cast<int>(std::ceil(std::clamp(*limit, 1.0, 1e6)));
}

int default_thread_count() {
#if defined(__linux__)
  const std::vector<int> cpus = allowed_cpus();
  const int cores = cpus.empty() ? logical_processors() : count_physical_cores(cpus, "");
  return std::min(cores, cgroup_cpu_limit("").value_or(cores));
#elif defined(__APPLE__)
  // The fast cores alone where there are two kinds: a slow one would hold up every loop's end.
  for (const char* name : {"hw.perflevel0.physicalcpu", "hw.physicalcpu"}) {
    int cores = 0;
    size_t size = sizeof cores;
    if (sysctlbyname(name, &cores, &size, nullptr, 0) == 0 && cores > 0) return cores;
  }
  return logical_processors();
#elif defined(_WIN32)
  DWORD_PTR allowed = 0, system = 0;
  DWORD bytes = 0;
  GetLogicalProcessorInformation(nullptr, &bytes);
  std::vector<SYSTEM_LOGICAL_PROCESSOR_INFORMATION> entries(bytes /
                                                            sizeof(SYSTEM_LOGICAL_PROCESSOR_INFORMATION));
  if (!GetProcessAffinityMask(GetCurrentProcess(), &allowed, &system) || entries.empty() ||
      !GetLogicalProcessorInformation(entries.data(), &bytes)) {
    return logical_processors();
  }
  const auto cores = std::count_if(entries.begin(), entries.end(), [&](const auto& entry) {
    return entry.Relationship == RelationProcessorCore && (entry.ProcessorMask & allowed) != 0;
  });
  return std::max(1, static_cast<int>(cores));
#else
  return logical_processors();
#endif
}

}  // namespace qwen2vl
