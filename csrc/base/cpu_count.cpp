#include "base/cpu_count.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#include "base/cgroup.h"
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

/// What tells kinds of cores apart: a file of each processor, and the share of the largest value from which
/// one counts as fast. Little cores have at most half of a big one's capacity, middle ones two thirds and
/// more. The same core in a compact layout, whose capacity is equal, runs at most at 3/4 of the full clock;
/// cores that are chosen for the highest boost differ from the others by less than a tenth.
struct Measure {
  const char* file;
  double fast_share;
};
constexpr Measure kMeasures[] = {{"cpu_capacity", 0.6}, {"cpufreq/cpuinfo_max_freq", 0.85}};

std::string folder_of(int cpu, const std::string& root) {
  return root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/";
}

/// "0-3,8" as numbers; empty where there is no such file.
std::set<int> read_cpu_list(const std::string& file) {
  std::set<int> cpus;
  std::ifstream list(file);
  for (std::string range; std::getline(list, range, ',');) {
    int first = 0, last = 0;
    char dash = 0;
    std::istringstream text(range);
    if (!(text >> first)) continue;
    if (!(text >> dash >> last)) last = first;
    for (int cpu = first; cpu <= std::min(last, first + 0xffff); ++cpu) cpus.insert(cpu);
  }
  return cpus;
}

std::vector<int> above_share(std::span<const int> cpus, const Measure& measure, const std::string& root) {
  std::vector<double> values;
  for (const int cpu : cpus) {
    double value = 0;
    if (!(std::ifstream(folder_of(cpu, root) + measure.file) >> value)) return {cpus.begin(), cpus.end()};
    values.push_back(value);
  }
  const double least = measure.fast_share * *std::max_element(values.begin(), values.end());
  std::vector<int> fast;
  for (size_t i = 0; i < cpus.size(); ++i)
    if (values[i] >= least) fast.push_back(cpus[i]);
  return fast;
}

/// By Intel's own list of performance cores, else by the first measure that tells some apart.
std::vector<int> fast_cpus(std::span<const int> cpus, const std::string& root) {
  const std::set<int> listed = read_cpu_list(root + "/sys/devices/cpu_core/cpus");
  std::vector<int> fast;
  std::copy_if(cpus.begin(), cpus.end(), std::back_inserter(fast),
               [&](int cpu) { return listed.contains(cpu); });
  if (!fast.empty()) return fast;
  for (const Measure& measure : kMeasures) {
    fast = above_share(cpus, measure, root);
    if (fast.size() < cpus.size()) break;
  }
  return fast;
}

int count_cores(std::span<const int> cpus, const std::string& root) {
  std::set<int> cores;  // each known by its first sibling
  for (const int cpu : cpus) {
    int first = cpu;
    std::ifstream list(folder_of(cpu, root) + "topology/thread_siblings_list");  // "0,64" or "0-1"
    if (!(list >> first)) first = cpu;
    cores.insert(first);
  }
  return static_cast<int>(cores.size());
}

[[maybe_unused]] CpuCount all_alike() {
  const int n = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return {n, n, n, std::nullopt};
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

#elif defined(__APPLE__)

int sysctl_number(const char* name, int otherwise) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value > 0 ? value : otherwise;
}

#elif defined(_WIN32)

/// fn(record) for every core that the process may use.
template <typename Fn>
bool for_each_core(const Fn& fn) {
  DWORD_PTR allowed = 0, system = 0;  // of the process's group; 0 where it has threads in several
  DWORD bytes = 0;
  GetLogicalProcessorInformationEx(RelationProcessorCore, nullptr, &bytes);
  std::vector<std::byte> buffer(bytes);
  const auto record_at = [&](DWORD at) {
    return reinterpret_cast<SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX*>(buffer.data() + at);
  };
  if (bytes == 0 || !GetProcessAffinityMask(GetCurrentProcess(), &allowed, &system) ||
      !GetLogicalProcessorInformationEx(RelationProcessorCore, record_at(0), &bytes))
    return false;
  for (DWORD at = 0; at < bytes; at += record_at(at)->Size) {
    const PROCESSOR_RELATIONSHIP& core = record_at(at)->Processor;
    const KAFFINITY mask = core.GroupMask[0].Mask & (allowed != 0 ? allowed : ~KAFFINITY{0});
    if (mask != 0) fn(core.EfficiencyClass, mask);
  }
  return true;
}

#endif

}  // namespace

int CpuCount::threads() const {
  return static_cast<int>(
      std::clamp(std::ceil(quota.value_or(fast_cores)), 1.0, std::max(fast_cores, 1) * 1.0));
}

CpuCount count_cpus(std::span<const int> cpus, const std::string& root) {
  return {static_cast<int>(cpus.size()), count_cores(cpus, root), count_cores(fast_cpus(cpus, root), root),
          cgroup_cpu_quota(root)};
}

CpuCount count_cpus() {
#if defined(__linux__)
  if (const std::vector<int> cpus = allowed_cpus(); !cpus.empty()) return count_cpus(cpus, "");
  return all_alike();
#elif defined(__APPLE__)
  CpuCount count = all_alike();
  count.cores = sysctl_number("hw.physicalcpu", count.logical);
  count.fast_cores = sysctl_number("hw.perflevel0.physicalcpu", count.cores);
  return count;
#elif defined(_WIN32)
  CpuCount count{0, 0, 0, std::nullopt};
  int best = -1;  // the higher its class, the faster a core
  const bool known = for_each_core([&](int efficiency_class, KAFFINITY mask) {
    if (efficiency_class > best) count.fast_cores = 0;
    best = std::max(best, efficiency_class);
    count.fast_cores += efficiency_class == best;
    count.cores += 1;
    count.logical += std::popcount(mask);
  });
  return known && count.cores > 0 ? count : all_alike();
#else
  return all_alike();
#endif
}

int default_thread_count() { return count_cpus().threads(); }

}  // namespace qwen2vl
