// clang-format off: tile.h is written in the names of simd.h
#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/simd/tile.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::avx512bf16 {
namespace {

constexpr int kChains = 16;  // latency 4 to 6, at most two a cycle

double bf16_dot(int64_t iterations) {
  Vec acc[kChains];
  for (auto& a : acc) a = set1(0.0f);
  const auto x = reinterpret_cast<__m512bh>(set1(1.0f));
  const auto y = reinterpret_cast<__m512bh>(set1(1e-3f * static_cast<float>(iterations)));
  for (int64_t i = 0; i < iterations; ++i) {
    QWEN2VL_UNROLL
    for (auto& a : acc) a = _mm512_dpbf16_ps(a, x, y);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = _mm512_add_ps(acc[0], acc[j]);
  volatile float sink = _mm512_cvtss_f32(acc[0]);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 32 * 2;
}

}  // namespace

void add_peaks(KernelTable& table) { table.peaks.float_dot = bf16_dot; }

}  // namespace qwen2vl::cpu::avx512bf16
