#include <immintrin.h>

#include "peaks.h"

namespace qwen2vl::bench {
namespace {

constexpr int kChains = 16;  // latency 4 to 5, two a cycle

double int8_dot(int64_t iterations) {
  __m512i acc[kChains];
  for (auto& a : acc) a = _mm512_setzero_si512();
  __m512i x = _mm512_set1_epi32(static_cast<int>(iterations)), y = _mm512_set1_epi8(3);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (auto& a : acc) a = _mm512_dpbusd_epi32(a, x, y);
  }
  for (auto& a : acc) x = _mm512_add_epi32(x, a);
  volatile int sink = _mm512_reduce_add_epi32(x);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 64 * 2;
}

double fp32_fma(int64_t iterations) {
  __m512 acc[kChains];
  for (auto& a : acc) a = _mm512_set1_ps(1.0f);
  const __m512 x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(1e-3f * static_cast<float>(iterations));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (auto& a : acc) a = _mm512_fmadd_ps(a, x, y);
  }
  __m512 sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, acc[i]);
  volatile float sink = _mm512_reduce_add_ps(sum);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 16 * 2;
}

uint64_t read(const uint8_t* data, size_t bytes) {
  __m512i acc[8];
  for (auto& a : acc) a = _mm512_setzero_si512();
  for (size_t i = 0; i < bytes; i += 512) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) acc[j] = _mm512_xor_si512(acc[j], _mm512_loadu_si512(data + i + 64 * j));
  }
  for (int j = 1; j < 8; ++j) acc[0] = _mm512_xor_si512(acc[0], acc[j]);
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(acc[0]));
}

}  // namespace

PeakLoops peak_loops_avx512() { return {int8_dot, fp32_fma, read}; }

}  // namespace qwen2vl::bench
