#pragma once

#include <optional>
#include <span>
#include <string>

namespace qwen2vl {

/// Distinct physical cores among the logical processors `cpus`, by Linux's topology files. `root` stands
/// before every path (empty: the real system; tests pass a made-up tree). A processor without such a file
/// counts as a core.
int count_physical_cores(std::span<const int> cpus, const std::string& root);

/// The CPU quota of this process's cgroup and of those above it (version 1 and 2), in processors, rounded up
/// and at least 1; nothing where there is none.
std::optional<int> cgroup_cpu_limit(const std::string& root);

}  // namespace qwen2vl
