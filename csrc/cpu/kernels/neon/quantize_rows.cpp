// clang-format off: the templates are written in the names of simd.h
#include "cpu/kernels/neon/simd.h"
#include "cpu/kernels/simd/quantize_rows.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

inline void store_block(const IntVec (&q)[kBlockVectors], const QuantizedRows& out, int64_t block) {
  int sums[2];
  for (int half = 0; half < 2; ++half) {
    const IntVec* v = q + 4 * half;
    const int16x8_t low = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
    const int8x16_t bytes = vcombine_s8(vmovn_s16(low), vmovn_s16(high));
    vst1q_s8(out.values + block * kBlock32 + 16 * half, bytes);
    sums[half] = vaddlvq_s8(bytes);
    out.corrections16[2 * block + half] = -128 * sums[half];
  }
  out.corrections32[block] = -128 * (sums[0] + sums[1]);
}

}  // namespace

namespace neon {
void add_quantize_rows(KernelTable& table) { table.quantize_rows = quantize_rows; }
}  // namespace neon
}  // namespace qwen2vl::cpu
