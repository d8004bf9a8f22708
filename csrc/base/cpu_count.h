#pragma once

#include <optional>
#include <span>
#include <string>

namespace qwen2vl {

/// The processors that this process may use.
struct CpuCount {
  int logical = 1;              ///< of the affinity mask, of which cpusets are a part
  int cores = 1;                ///< physical ones: SMT siblings count once
  int fast_cores = 1;           ///< those of the faster kind; all where there is one kind
  std::optional<double> quota;  ///< so many processors' time, where a cgroup grants no more

  /// The fast cores, or what the quota grants, rounded up. At least 1.
  int threads() const;
};

CpuCount count_cpus();

/// By Linux's files, of the logical processors `cpus` (at least one). `root` stands before every path (empty:
/// the real system; tests pass a made-up tree). What no file tells apart is alike.
CpuCount count_cpus(std::span<const int> cpus, const std::string& root);

}  // namespace qwen2vl
