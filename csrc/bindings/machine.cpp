#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "bindings/bindings.h"
#include "cpu/kernels/kernel_table.h"

namespace qwen2vl::bindings {

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
}

}  // namespace qwen2vl::bindings
