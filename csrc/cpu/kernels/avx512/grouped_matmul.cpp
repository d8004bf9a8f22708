#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// 24 sums, 4 weights and a broadcast fit 32 registers.
constexpr int kTilePanels = 4;
constexpr int max_group_rows(int panels) { return panels == 1 ? 12 : 6; }

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/grouped_matmul.h"

namespace qwen2vl::cpu::avx512 {
void add_grouped_matmul(KernelTable& table) { set_grouped_kernels(table); }
}  // namespace qwen2vl::cpu::avx512
