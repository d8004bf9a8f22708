// clang-format off: the templates are written in the names of simd.h
#include "cpu/kernels/avx2/simd.h"
#include "cpu/kernels/simd/quantize_rows.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/store_quants.h"

namespace qwen2vl::cpu {
namespace {

inline void store_block(const IntVec (&q)[kBlockVectors], const QuantizedRows& out, int64_t block) {
  // Packing works within 128-bit halves: the permutation puts the groups of four bytes back in order.
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  const __m256i quants = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  store_quants(quants, out, block);
}

}  // namespace

namespace avx2 {
void add_quantize_rows(KernelTable& table) { table.quantize_rows = quantize_rows; }
}  // namespace avx2
}  // namespace qwen2vl::cpu
