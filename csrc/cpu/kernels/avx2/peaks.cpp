#include "cpu/kernels/avx2/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/tile.h"

namespace qwen2vl::cpu::avx2 {
namespace {

constexpr int kChains = 12;  // latency 4 to 5, two a cycle, 16 registers

/// The best case of AVX2: 8-bit products added up in 16 bits, two of each a cycle. Factors that are chained
/// keep the compiler from taking a product out of the loop; all fits 16 registers.
double int8_dot(int64_t iterations) {
  constexpr int kSums = 6;
  __m256i acc[kSums], x[3], y[2];
  QWEN2VL_UNROLL
  for (int j = 0; j < kSums; ++j) acc[j] = _mm256_setzero_si256();
  QWEN2VL_UNROLL
  for (int j = 0; j < 3; ++j) x[j] = _mm256_set1_epi32(static_cast<int>(iterations) + j);
  y[0] = x[0], y[1] = x[1];
  for (int64_t i = 0; i < iterations; ++i) {
    y[0] = chained(y[0]);
    y[1] = chained(y[1]);
    QWEN2VL_UNROLL
    for (int j = 0; j < kSums; ++j)
      acc[j] = _mm256_add_epi16(acc[j], _mm256_maddubs_epi16(x[j % 3], y[j / 3]));
  }
  QWEN2VL_UNROLL
  for (int j = 1; j < kSums; ++j) acc[0] = _mm256_xor_si256(acc[0], acc[j]);
  volatile int sink = _mm256_extract_epi32(acc[0], 0);
  (void)sink;
  return static_cast<double>(iterations) * kSums * 32 * 2;
}

double fp32_fma(int64_t iterations) {
  __m256 acc[kChains];
  for (auto& a : acc) a = _mm256_set1_ps(1.0f);
  const __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(1e-3f * static_cast<float>(iterations));
  for (int64_t i = 0; i < iterations; ++i) {
    QWEN2VL_UNROLL
    for (auto& a : acc) a = _mm256_fmadd_ps(a, x, y);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = _mm256_add_ps(acc[0], acc[j]);
  volatile float sink = _mm256_cvtss_f32(acc[0]);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 8 * 2;
}

uint64_t read(const uint8_t* data, size_t bytes) {
  __m256i acc[8];
  for (auto& a : acc) a = _mm256_setzero_si256();
  for (size_t i = 0; i < bytes; i += sizeof(acc)) {
    QWEN2VL_UNROLL
    for (int j = 0; j < 8; ++j) {
      const auto* p = reinterpret_cast<const __m256i*>(data + i + 32 * j);
      acc[j] = _mm256_xor_si256(acc[j], _mm256_loadu_si256(p));
    }
  }
  for (int j = 1; j < 8; ++j) acc[0] = _mm256_xor_si256(acc[0], acc[j]);
  alignas(32) uint64_t words[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), acc[0]);
  return words[0] ^ words[1] ^ words[2] ^ words[3];
}

}  // namespace

void add_peaks(KernelTable& table) { table.peaks = {int8_dot, fp32_fma, fp32_fma, read}; }

}  // namespace qwen2vl::cpu::avx2
