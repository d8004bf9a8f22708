#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/cgroup.h"
#include "base/cpu_count.h"
#include "base/thread_pool.h"
#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "cpu/kernels/kernel_table.h"
#include "cpu/limits.h"
#include "engine/plugin.h"

namespace qwen2vl::bindings {
namespace {

void require_seconds(double seconds) {
  if (!(seconds > 0.0 && seconds <= 60.0))
    throw std::invalid_argument("seconds: expected more than 0, at most 60, found " +
                                std::to_string(seconds));
}

py::dict machine() {
  const CpuCount cpus = count_cpus();
  py::dict result;
  result["logical"] = cpus.logical;
  result["cores"] = cpus.cores;
  result["fast_cores"] = cpus.fast_cores;
  result["cpu_quota"] = cpus.quota;
  result["memory_limit"] = cgroup_memory_limit("");
  return result;
}

py::dict measure_limits(const py::str& isa, const py::object& n_threads, double seconds) {
  const int threads = thread_count(n_threads);
  require_seconds(seconds);
  const std::string kernels = text(isa);
  cpu::MachineLimits limits;
  {
    py::gil_scoped_release release;
    limits = cpu::measure_limits(cpu::select_kernels(kernels), threads > 0 ? threads : default_thread_count(),
                                 seconds);
  }
  py::dict result;
  result["int8_ops_per_s"] = limits.int8_ops;
  result["float_ops_per_s"] = limits.float_ops;
  result["fp32_ops_per_s"] = limits.fp32_ops;
  result["read_bytes_per_s"] = limits.read_bytes;
  return result;
}

py::list devices_of(const py::object& plugin) {
  const std::filesystem::path library = path(plugin, "plugin");
  std::vector<qwen2vl_device> devices;
  {
    py::gil_scoped_release release;
    devices = plugin_devices(open_plugin(library));
  }
  py::list result;
  for (const qwen2vl_device& device : devices) {
    py::dict d;
    d["name"] = plugin_text(device.name);
    d["total_bytes"] = device.total_bytes;
    d["free_bytes"] = device.free_bytes;
    d["compute_capability"] = device.compute_capability;
    d["multiprocessors"] = device.multiprocessors;
    result.append(d);
  }
  return result;
}

py::dict measure_device_limits(const py::object& plugin, const py::object& index, double seconds) {
  const std::filesystem::path library = path(plugin, "plugin");
  const auto device = static_cast<int>(integer(index, "index", 0, std::numeric_limits<int32_t>::max()));
  require_seconds(seconds);
  qwen2vl_limits limits;
  {
    py::gil_scoped_release release;
    limits = measure_plugin_limits(open_plugin(library), device, seconds);
  }
  py::dict result;
  result["int8_ops_per_s"] = limits.float_ops;  // whatever 8 bits are stored in, products are of 16
  result["float_ops_per_s"] = limits.float_ops;
  result["fp32_ops_per_s"] = limits.fp32_ops;
  result["read_bytes_per_s"] = limits.read_bytes;
  return result;
}

}  // namespace

void register_machine(py::module_& m) {
  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (const cpu::KernelTable* table : cpu::supported_kernels()) names.emplace_back(table->isa);
        return names;
      },
      "Instruction sets that are built in and that this processor runs, best first; the last is "
      "\"generic\".");
  m.def("default_thread_count", &default_thread_count,
        "Fast physical cores allowed by the affinity mask and the cgroup CPU quota.");
  m.def("machine", &machine,
        "What this process may use: logical processors, cores, fast_cores; cpu_quota (processors) and "
        "memory_limit (bytes) of its cgroup, or None.");
  m.def("measure_limits", &measure_limits, py::arg("isa") = "", py::arg("n_threads") = 0,
        py::arg("seconds") = 0.5, "What this machine can do at most in a second, all threads together.");
  m.def("plugin_devices", &devices_of, py::arg("plugin"), "Devices that a plug-in library finds.");
  m.def("measure_device_limits", &measure_device_limits, py::arg("plugin"), py::arg("index") = 0,
        py::arg("seconds") = 0.5, "What a plug-in's device can do at most in a second.");
}

}  // namespace qwen2vl::bindings
