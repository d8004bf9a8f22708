#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/tile.h"

namespace qwen2vl::cpu::avx512 {
namespace {

constexpr int kChains = 16;  // latency 4 to 5, two a cycle

double int8_dot(int64_t iterations) {
  __m512i acc[kChains];
  for (auto& a : acc) a = _mm512_setzero_si512();
  const __m512i x = _mm512_set1_epi32(static_cast<int>(iterations)), y = _mm512_set1_epi8(3);
  for (int64_t i = 0; i < iterations; ++i) {
    QWEN2VL_UNROLL
    for (auto& a : acc) a = _mm512_dpbusd_epi32(a, x, y);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = _mm512_add_epi32(acc[0], acc[j]);
  volatile int sink = _mm512_cvtsi512_si32(acc[0]);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 64 * 2;
}

double fp32_fma(int64_t iterations) {
  __m512 acc[kChains];
  for (auto& a : acc) a = _mm512_set1_ps(1.0f);
  const __m512 x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(1e-3f * static_cast<float>(iterations));
  for (int64_t i = 0; i < iterations; ++i) {
    QWEN2VL_UNROLL
    for (auto& a : acc) a = _mm512_fmadd_ps(a, x, y);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = _mm512_add_ps(acc[0], acc[j]);
  volatile float sink = _mm512_cvtss_f32(acc[0]);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 16 * 2;
}

uint64_t read(const uint8_t* data, size_t bytes) {
  __m512i acc[8];
  for (auto& a : acc) a = _mm512_setzero_si512();
  for (size_t i = 0; i < bytes; i += sizeof(acc)) {
    QWEN2VL_UNROLL
    for (int j = 0; j < 8; ++j) acc[j] = _mm512_xor_si512(acc[j], _mm512_loadu_si512(data + i + 64 * j));
  }
  for (int j = 1; j < 8; ++j) acc[0] = _mm512_xor_si512(acc[0], acc[j]);
  alignas(64) uint64_t words[8];
  _mm512_store_si512(words, acc[0]);
  for (int j = 1; j < 8; ++j) words[0] ^= words[j];
  return words[0];
}

}  // namespace

void add_peaks(KernelTable& table) { table.peaks = {int8_dot, fp32_fma, fp32_fma, read}; }

}  // namespace qwen2vl::cpu::avx512
