#include <immintrin.h>

#include "peaks.h"

namespace qwen2vl::bench {
namespace {

constexpr int kChains = 12;  // latency 4 to 5, two a cycle, 16 registers

/// The best case of AVX2: 8-bit products added up in 16 bits.
double int8_dot(int64_t iterations) {
  __m256i acc[kChains];
  for (auto& a : acc) a = _mm256_setzero_si256();
  __m256i x = _mm256_set1_epi32(static_cast<int>(iterations));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (auto& a : acc) a = _mm256_add_epi16(a, _mm256_maddubs_epi16(x, a));
  }
  for (auto& a : acc) x = _mm256_add_epi32(x, a);
  volatile int sink = _mm256_extract_epi32(x, 0);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 32 * 2;
}

double fp32_fma(int64_t iterations) {
  __m256 acc[kChains];
  for (auto& a : acc) a = _mm256_set1_ps(1.0f);
  const __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(1e-3f * static_cast<float>(iterations));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (auto& a : acc) a = _mm256_fmadd_ps(a, x, y);
  }
  __m256 sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm256_add_ps(sum, acc[i]);
  volatile float sink = _mm256_cvtss_f32(sum);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 8 * 2;
}

uint64_t read(const uint8_t* data, size_t bytes) {
  __m256i acc[8];
  for (auto& a : acc) a = _mm256_setzero_si256();
  for (size_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const auto* p = reinterpret_cast<const __m256i*>(data + i + 32 * j);
      acc[j] = _mm256_xor_si256(acc[j], _mm256_loadu_si256(p));
    }
  }
  for (int j = 1; j < 8; ++j) acc[0] = _mm256_xor_si256(acc[0], acc[j]);
  return static_cast<uint64_t>(_mm256_extract_epi64(acc[0], 0) ^ _mm256_extract_epi64(acc[0], 3));
}

}  // namespace

PeakLoops peak_loops_avx2() { return {int8_dot, fp32_fma, read}; }

}  // namespace qwen2vl::bench
