// clang-format off: the templates are written in the names of simd.h
#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/simd/quantize_rows.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/store_quants.h"

namespace qwen2vl::cpu {
namespace {

inline void store_block(const IntVec (&q)[kBlockVectors], const QuantizedRows& out, int64_t block) {
  store_quants(_mm256_set_m128i(_mm512_cvtepi32_epi8(q[1]), _mm512_cvtepi32_epi8(q[0])), out, block);
}

}  // namespace

namespace avx512 {
void add_quantize_rows(KernelTable& table) { table.quantize_rows = quantize_rows; }
}  // namespace avx512
}  // namespace qwen2vl::cpu
