#include "cpu/kernels/avxvnni/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/unsigned_dot.h"

namespace qwen2vl::cpu {
namespace {

/// Tiles of 6 rows x 1 panel (two vectors): 12 integer sums, 2 weights and a broadcast fit 16 registers. The
/// float sums, wanted once a block, do not.
constexpr int kQ8TilePanels = 1;
constexpr int max_q8_tile_rows(int, int planes) { return planes == 2 ? 3 : 6; }

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/matmul_q8.h"

namespace qwen2vl::cpu::avxvnni {
void add_matmul_q8(KernelTable& table) { table.matmul_q8 = matmul_q8; }
}  // namespace qwen2vl::cpu::avxvnni
