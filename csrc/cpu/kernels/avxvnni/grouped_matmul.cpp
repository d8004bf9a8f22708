#include "cpu/kernels/avxvnni/simd.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// 12 sums, 2 weights and a broadcast fit 16 registers; 8 loads feed 12 products (two of each a cycle).
constexpr int kTilePanels = 1;
constexpr int max_group_rows(int) { return 6; }

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/grouped_matmul.h"

namespace qwen2vl::cpu::avxvnni {
void add_grouped_matmul(KernelTable& table) { set_grouped_kernels(table); }
}  // namespace qwen2vl::cpu::avxvnni
