#pragma once

#include <optional>
#include <string>

namespace qwen2vl {

// Of this process's cgroup and of those above it (version 1 and 2, wherever they are mounted); nothing where
// there is none. `root` stands before every path (empty: the real system; tests pass a made-up tree).

/// The CPU quota, in processors.
std::optional<double> cgroup_cpu_quota(const std::string& root);
/// The memory limit, in bytes.
std::optional<double> cgroup_memory_limit(const std::string& root);

}  // namespace qwen2vl
