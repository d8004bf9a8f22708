#include <stdexcept>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "bindings/bindings.h"
#include "cpu/kernels/kernel_table.h"
#include "cpu/limits.h"

namespace qwen2vl::bindings {
namespace {

py::dict measure_limits(const std::string& isa, int n_threads, double seconds) {
  if (n_threads < 0 || n_threads > 1024)
    throw std::invalid_argument("n_threads: expected 0 (automatic) to 1024, found " +
                                std::to_string(n_threads));
  if (!(seconds > 0.0 && seconds <= 60.0))
    throw std::invalid_argument("seconds: expected more than 0, at most 60, found " +
                                std::to_string(seconds));
  cpu::MachineLimits limits;
  {
    py::gil_scoped_release release;
    limits = cpu::measure_limits(cpu::select_kernels(isa), n_threads > 0 ? n_threads : default_thread_count(),
                                 seconds);
  }
  py::dict result;
  result["int8_ops_per_s"] = limits.int8_ops;
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
        "Physical cores allowed by the affinity mask and the cgroup CPU quota.");
  m.def("measure_limits", &measure_limits, py::arg("isa") = "", py::arg("n_threads") = 0,
        py::arg("seconds") = 0.5, "What this machine can do at most in a second, all threads together.");
}

}  // namespace qwen2vl::bindings
