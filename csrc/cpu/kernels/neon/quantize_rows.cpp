#include <math.h>
#include <string.h>

#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/neon/simd.h"

namespace qwen2vl::cpu {
namespace {

constexpr int kVectors = static_cast<int>(kBlock32) / kLanes;

/// A block's integers and their corrections.
inline void store_block(const IntVec (&q)[kVectors], const QuantizedRows& out, int64_t block) {
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

/// The rounding, and what becomes of tiny or non-finite blocks: generic/quantize_rows.cpp.
inline void quantize_block(const float* x, const QuantizedRows& out, int64_t block) {
  // Compared as integers, magnitudes order as floats do, with infinity and NaN at the top.
  Vec v[kVectors];
  uint32x4_t bits = vdupq_n_u32(0);
  for (int i = 0; i < kVectors; ++i) {
    v[i] = load(x + kLanes * i);
    bits = vmaxq_u32(bits, vreinterpretq_u32_f32(vabsq_f32(v[i])));
  }
  const uint32_t maximum_bits = vmaxvq_u32(bits);
  float maximum;
  memcpy(&maximum, &maximum_bits, sizeof maximum);

  const bool finite = maximum_bits < 0x7f800000;
  float inverse = 0.0f, scale = finite ? 0.0f : NAN;
  if (finite && maximum >= 1e-30f) {
    inverse = 127.0f / maximum;
    scale = maximum / 127.0f;
  }
  const IntVec keep = set1_int(finite ? -1 : 0);
  IntVec q[kVectors];
  for (int i = 0; i < kVectors; ++i) q[i] = bit_and(to_int(mul(v[i], set1(inverse))), keep);
  out.scales[block] = scale;
  store_block(q, out, block);
  if (out.planes == 1) return;
  // What these have left, in 256ths of the scale.
  const IntVec limit = set1_int(127), least = set1_int(-127);
  for (int i = 0; i < kVectors; ++i) {
    const Vec rest = vfmsq_f32(v[i], to_float(q[i]), set1(scale));
    const IntVec rounded = bit_and(to_int(mul(rest, set1(inverse * 256.0f))), keep);
    q[i] = vmaxq_s32(vminq_s32(rounded, limit), least);
  }
  store_block(q, out, block + out.rows * (out.cols / kBlock32));
}

void quantize_rows(const float* x, int64_t x_stride, int64_t rows, const QuantizedRows& out,
                   int64_t row_begin) {
  const int64_t blocks = out.cols / kBlock32;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t block = (row_begin + i) * blocks;
    for (int64_t b = 0; b < blocks; ++b) quantize_block(x + i * x_stride + b * kBlock32, out, block + b);
  }
}

}  // namespace

namespace neon {
void add_quantize_rows(KernelTable& table) { table.quantize_rows = quantize_rows; }
}  // namespace neon
}  // namespace qwen2vl::cpu
