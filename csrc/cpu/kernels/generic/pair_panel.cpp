#include "base/half.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::generic {
namespace {

void pair_f16_panel(const uint16_t* panel, int64_t depth, uint16_t* out) {
  for (int64_t k = 0; k < depth + depth % 2; ++k)
    for (int64_t r = 0; r < kPanelRows; ++r)
      out[(k / 2 * kPanelRows + r) * 2 + k % 2] =
          k < depth ? f32_to_bf16(f16_to_f32(panel[k * kPanelRows + r])) : uint16_t{0};
}

}  // namespace

void add_pair_panel(KernelTable& table) { table.pair_f16_panel = pair_f16_panel; }

}  // namespace qwen2vl::cpu::generic
