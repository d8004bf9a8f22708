#include "base/cgroup.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <vector>

namespace qwen2vl {
namespace {

/// A hierarchy that can limit something.
struct Hierarchy {
  bool version_2;
  std::string mount;
};

bool lists(const std::string& names, const std::string& controller) {
  std::istringstream list(names);
  for (std::string name; std::getline(list, name, ',');)
    if (name == controller) return true;
  return false;
}

/// Of /proc/self/mountinfo: "ID PARENT DEVICE ROOT MOUNT OPTIONS... - TYPE SOURCE SUPER_OPTIONS".
std::vector<Hierarchy> hierarchies(const std::string& controller, const std::string& root) {
  std::vector<Hierarchy> found;
  std::ifstream mounts(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    std::istringstream fields(line);
    std::string skipped, mount, type, options;
    fields >> skipped >> skipped >> skipped >> skipped >> mount;
    while (fields >> skipped && skipped != "-") {
    }
    fields >> type >> skipped >> options;
    if (type == "cgroup2") found.push_back({true, mount});
    if (type == "cgroup" && lists(options, controller)) found.push_back({false, mount});
  }
  return found;
}

/// The process's group below a mount, "" for the mount's own. Lines are "ID:CONTROLLERS:PATH", of version 2
/// "0::PATH".
std::string group_of(const Hierarchy& hierarchy, const std::string& controller, const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (hierarchy.version_2 ? controllers.empty() : lists(controllers, controller))
      return line.substr(second + 1);
  }
  return "";
}

/// The least of what `read` (folder, whether version 2) finds on the way up.
template <typename Read>
std::optional<double> least(const std::string& controller, const std::string& root, const Read& read) {
  std::optional<double> found;
  for (const Hierarchy& hierarchy : hierarchies(controller, root)) {
    // Inside a container the path may be the host's and not exist below the mount; the walk up ends at the
    // mount, which is then the container's own group.
    for (std::string group = group_of(hierarchy, controller, root);; group.resize(group.rfind('/'))) {
      if (group == "/") group.clear();
      if (const std::optional<double> limit = read(root + hierarchy.mount + group, hierarchy.version_2))
        found = std::min(found.value_or(*limit), *limit);
      if (group.empty() || group.front() != '/') break;
    }
  }
  return found;
}

/// cpu.max holds "QUOTA PERIOD" or "max PERIOD"; version 1 has a file for each, and -1 for no quota.
std::optional<double> read_quota(const std::string& folder, bool version_2) {
  double quota = 0, period = 0;
  if (version_2)
    std::ifstream(folder + "/cpu.max") >> quota >> period;
  else if (std::ifstream(folder + "/cpu.cfs_quota_us") >> quota)
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  if (quota > 0 && period > 0) return quota / period;
  return std::nullopt;
}

/// "max" is none; version 1 has the largest multiple of a page instead.
std::optional<double> read_memory_limit(const std::string& folder, bool version_2) {
  constexpr double kNone = 0x1p62;
  double bytes = 0;
  std::ifstream(folder + (version_2 ? "/memory.max" : "/memory.limit_in_bytes")) >> bytes;
  if (bytes > 0 && bytes < kNone) return bytes;
  return std::nullopt;
}

}  // namespace

std::optional<double> cgroup_cpu_quota(const std::string& root) { return least("cpu", root, read_quota); }

std::optional<double> cgroup_memory_limit(const std::string& root) {
  return least("memory", root, read_memory_limit);
}

}  // namespace qwen2vl
