#include <doctest/doctest.h>

#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "base/cgroup.h"
#include "base/cpu_count.h"
#include "temporary_folder.h"

using namespace qwen2vl;

namespace {

std::vector<int> first(int n) {
  std::vector<int> cpus(static_cast<size_t>(n));
  std::iota(cpus.begin(), cpus.end(), 0);
  return cpus;
}

/// A machine of processors whose file `name` holds these values.
void write_values(const TemporaryFolder& root, const std::string& name, const std::vector<int>& values) {
  for (size_t cpu = 0; cpu < values.size(); ++cpu)
    root.write("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/" + name,
               std::to_string(values[cpu]) + "\n");
}

int fast_cores(const TemporaryFolder& root, int n) { return count_cpus(first(n), root.path()).fast_cores; }

const char* const kVersion2 =
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n";

}  // namespace

TEST_CASE("SMT siblings count once") {
  const TemporaryFolder root;
  const std::string cpus = "sys/devices/system/cpu/cpu";
  root.write(cpus + "0/topology/thread_siblings_list", "0,4\n");
  root.write(cpus + "4/topology/thread_siblings_list", "0,4\n");
  root.write(cpus + "1/topology/thread_siblings_list", "1-2\n");
  root.write(cpus + "2/topology/thread_siblings_list", "1-2\n");
  root.write(cpus + "3/topology/thread_siblings_list", "3\n");
  const auto cores = [&](const std::vector<int>& some) { return count_cpus(some, root.path()).cores; };
  CHECK(cores({0, 1, 2, 3, 4}) == 3);
  CHECK(cores({4, 2}) == 2);
  CHECK(cores({0, 4, 70, 71}) == 3);  // 70, 71: no such file
  CHECK(count_cpus(std::vector<int>{0, 1, 2, 3, 4}, root.path()).logical == 5);
}

TEST_CASE("without files every processor is a fast core") {
  const TemporaryFolder root;
  const CpuCount count = count_cpus(first(6), root.path());
  CHECK(count.logical == 6);
  CHECK(count.cores == 6);
  CHECK(count.fast_cores == 6);
  CHECK(count.quota == std::nullopt);
  CHECK(count.threads() == 6);
}

TEST_CASE("an Intel hybrid: two performance cores with two threads each, four efficient ones") {
  const TemporaryFolder root;
  root.write("sys/devices/cpu_core/cpus", "0-3\n");
  root.write("sys/devices/cpu_atom/cpus", "4-7\n");
  for (const int cpu : {0, 1, 2, 3})
    root.write("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list",
               cpu < 2 ? "0-1\n" : "2-3\n");
  CHECK(count_cpus(first(8), root.path()).cores == 6);
  CHECK(fast_cores(root, 8) == 2);
  CHECK(count_cpus(std::vector<int>{4, 5, 6}, root.path()).fast_cores == 3);  // where it may use no other
  CHECK(count_cpus(std::vector<int>{3, 4, 5}, root.path()).fast_cores == 1);
}

TEST_CASE("kinds of cores by their capacity") {
  const TemporaryFolder root;
  write_values(root, "cpu_capacity", {397, 397, 397, 397, 1024, 1024, 1024, 1024});
  CHECK(fast_cores(root, 8) == 4);
  CHECK(fast_cores(root, 4) == 4);  // little ones alone are the fastest there are
  write_values(root, "cpu_capacity", {290, 290, 810, 810, 810, 870, 870, 1024});
  CHECK(fast_cores(root, 8) == 6);  // middle ones count
  write_values(root, "cpufreq/cpuinfo_max_freq", std::vector<int>(8, 3000000));
  CHECK(fast_cores(root, 8) == 6);
}

TEST_CASE("kinds of cores by their clock, where their capacity is equal or unknown") {
  const TemporaryFolder root;
  const std::vector<int> compact{5100000, 5100000, 3300000, 3300000, 3300000};
  write_values(root, "cpufreq/cpuinfo_max_freq", compact);
  CHECK(fast_cores(root, 5) == 2);
  write_values(root, "cpu_capacity", std::vector<int>(5, 1024));
  CHECK(fast_cores(root, 5) == 2);
  write_values(root, "cpufreq/cpuinfo_max_freq", {5600000, 5600000, 6000000, 6000000, 5600000});
  CHECK(fast_cores(root, 5) == 5);  // favoured cores are no kind of their own
  CHECK(fast_cores(root, 6) == 6);  // one without a file: nothing is known
}

TEST_CASE("cgroup quotas are found, version 2") {
  const TemporaryFolder root;
  CHECK(cgroup_cpu_quota(root.path()) == std::nullopt);
  root.write("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + std::string(kVersion2));
  root.write("proc/self/cgroup", "0::/user/job\n");
  CHECK(cgroup_cpu_quota(root.path()) == std::nullopt);
  root.write("sys/fs/cgroup/user/job/cpu.max", "max 100000\n");
  CHECK(cgroup_cpu_quota(root.path()) == std::nullopt);
  root.write("sys/fs/cgroup/user/cpu.max", "250000 100000\n");  // set on a group above
  CHECK(cgroup_cpu_quota(root.path()) == 2.5);
  root.write("sys/fs/cgroup/user/job/cpu.max", "50000 100000\n");
  CHECK(cgroup_cpu_quota(root.path()) == 0.5);
}

TEST_CASE("cgroup quotas are found, version 1, also where the path is the host's") {
  const TemporaryFolder root;
  root.write("proc/self/mountinfo",
             "31 23 0:27 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
             "32 23 0:28 /docker/abc /elsewhere/cpu ro - cgroup cgroup rw,cpu,cpuacct\n"
             "33 23 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup rw\n");
  root.write("proc/self/cgroup", "12:memory:/docker/abc\n4:cpuacct,cpu:/docker/abc\n0::/docker/abc\n");
  root.write("sys/fs/cgroup/memory/cpu.cfs_quota_us", "1\n");
  root.write("sys/fs/cgroup/memory/cpu.cfs_period_us", "1\n");
  root.write("elsewhere/cpu/cpu.cfs_quota_us", "-1\n");
  root.write("elsewhere/cpu/cpu.cfs_period_us", "100000\n");
  CHECK(cgroup_cpu_quota(root.path()) == std::nullopt);
  root.write("elsewhere/cpu/cpu.cfs_quota_us", "400000\n");
  CHECK(cgroup_cpu_quota(root.path()) == 4.0);
  root.write("elsewhere/cpu/docker/abc/cpu.cfs_quota_us", "150000\n");
  root.write("elsewhere/cpu/docker/abc/cpu.cfs_period_us", "100000\n");
  CHECK(cgroup_cpu_quota(root.path()) == 1.5);
}

TEST_CASE("cgroup limits of memory are found") {
  const TemporaryFolder root;
  root.write("proc/self/mountinfo",
             kVersion2 + std::string("31 23 0:27 / /v1 rw - cgroup cgroup rw,memory\n"));
  root.write("proc/self/cgroup", "4:memory:/job\n0::/job\n");
  root.write("sys/fs/cgroup/job/memory.max", "max\n");
  root.write("v1/job/memory.limit_in_bytes", "9223372036854771712\n");  // none
  CHECK(cgroup_memory_limit(root.path()) == std::nullopt);
  root.write("v1/memory.limit_in_bytes", "2147483648\n");
  CHECK(cgroup_memory_limit(root.path()) == 0x1p31);
  root.write("sys/fs/cgroup/job/memory.max", "1073741824\n");
  CHECK(cgroup_memory_limit(root.path()) == 0x1p30);
}

TEST_CASE("what a quota grants is rounded up, and never more than the fast cores") {
  const auto threads = [](int fast, double quota) { return CpuCount{16, 8, fast, quota}.threads(); };
  CHECK(CpuCount{16, 8, 6, std::nullopt}.threads() == 6);
  CHECK(threads(6, 2.5) == 3);
  CHECK(threads(6, 0.01) == 1);
  CHECK(threads(6, 6.5) == 6);
  CHECK(threads(6, 1e300) == 6);
}

TEST_CASE("broken files tell nothing") {
  const TemporaryFolder root;
  root.write("proc/self/mountinfo", "\n- \n1 2 3\n" + std::string(kVersion2));
  root.write("proc/self/cgroup", "nothing\n:\n0::\n");
  root.write("sys/fs/cgroup/cpu.max", "-5 0\n");
  root.write("sys/devices/cpu_core/cpus", "x,-,9-\n0-99999999999\n");
  write_values(root, "cpu_capacity", {0, 0});
  CHECK(cgroup_cpu_quota(root.path()) == std::nullopt);
  CHECK(fast_cores(root, 2) == 2);
}
