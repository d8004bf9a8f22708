#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/unsigned_dot.h"

namespace qwen2vl::cpu {
namespace {

/// Tiles of 6 rows x 2 panels: 12 integer and 12 float accumulators, 2 weight vectors, a broadcast and the
/// masks fit 32 registers; 8 loads feed 12 dot products (two of each a cycle). Per block and accumulator, the
/// two pipes of the 8 dot products also multiply and multiply-add the scales: 80 % of the peak is the
/// ceiling.
constexpr int kQ8TilePanels = 2;
/// Two planes have twice the integer sums: 4 rows.
constexpr int max_q8_tile_rows(int panels, int planes) { return planes == 2 ? 4 : panels == 2 ? 6 : 8; }

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/matmul_q8.h"

namespace qwen2vl::cpu::avx512 {
void add_matmul_q8(KernelTable& table) { table.matmul_q8 = matmul_q8; }
}  // namespace qwen2vl::cpu::avx512
