#include "cpu/kernels/avx2/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/store_quants.h"

namespace qwen2vl::cpu {
namespace {

/// A block's integers and their corrections.
inline void store_block(const __m256i (&q)[4], const QuantizedRows& out, int64_t block) {
  // Packing works within 128-bit halves: the permutation puts the groups of four bytes back in order.
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  const __m256i quants = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  store_quants(quants, out, block);
}

/// The rounding, and what becomes of tiny or non-finite blocks: generic/quantize_rows.cpp.
inline void quantize_block(const float* x, const QuantizedRows& out, int64_t block) {
  // Compared as integers, magnitudes order as floats do, with infinity and NaN at the top.
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256 v[4];
  __m256i bits = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_ps(x + 8 * i);
    bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
  }
  __m128i bits4 = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  bits4 = _mm_max_epi32(bits4, _mm_shuffle_epi32(bits4, 0x4e));
  bits4 = _mm_max_epi32(bits4, _mm_shuffle_epi32(bits4, 0xb1));
  const __m128 maximum = _mm_castsi128_ps(bits4);

  const bool finite = _mm_cvtsi128_si32(bits4) < 0x7f800000;
  __m128 inverse = _mm_setzero_ps(), factor = _mm_setzero_ps();
  if (finite && _mm_cvtss_f32(maximum) >= 1e-30f) {
    inverse = _mm_div_ps(_mm_set1_ps(127.0f), maximum);
    factor = _mm_div_ps(maximum, _mm_set1_ps(127.0f));
  } else if (!finite) {
    factor = _mm_castsi128_ps(_mm_set1_epi32(0x7fc00000));
  }
  const __m256 by = _mm256_broadcastss_ps(inverse);
  const __m256i keep = _mm256_set1_epi32(finite ? -1 : 0);
  __m256i q[4];
  for (int i = 0; i < 4; ++i) q[i] = _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(v[i], by)), keep);
  _mm_store_ss(out.scales + block, factor);
  store_block(q, out, block);
  if (out.planes == 1) return;
  // What these have left, in 256ths of the scale.
  const __m256 scale = _mm256_broadcastss_ps(factor), by256 = _mm256_mul_ps(by, _mm256_set1_ps(256));
  const __m256i limit = _mm256_set1_epi32(127), least = _mm256_set1_epi32(-127);
  for (int i = 0; i < 4; ++i) {
    const __m256 rest = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(q[i]), scale, v[i]);
    const __m256i rounded = _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(rest, by256)), keep);
    q[i] = _mm256_max_epi32(_mm256_min_epi32(rounded, limit), least);
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

namespace avx2 {
void add_quantize_rows(KernelTable& table) { table.quantize_rows = quantize_rows; }
}  // namespace avx2
}  // namespace qwen2vl::cpu
