#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/neon/simd.h"
#include "cpu/kernels/simd/tile.h"

namespace qwen2vl::cpu::neon {
namespace {

constexpr int kChains = 24;  // latency 4, up to four a cycle, 32 registers

/// The best case without dot products: 8-bit products added up in 16 bits.
double int8_dot(int64_t iterations) {
  int16x8_t acc[kChains];
  for (auto& a : acc) a = vdupq_n_s16(0);
  const int8x8_t x = vdup_n_s8(static_cast<int8_t>(iterations)), y = vdup_n_s8(3);
  for (int64_t i = 0; i < iterations; ++i) {
    QWEN2VL_UNROLL
    for (int j = 0; j < kChains; ++j) acc[j] = vmlal_s8(acc[j], x, y);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = veorq_s16(acc[0], acc[j]);
  volatile int sink = vgetq_lane_s16(acc[0], 0);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 8 * 2;
}

double fp32_fma(int64_t iterations) {
  Vec acc[kChains];
  for (auto& a : acc) a = set1(1.0f);
  const Vec x = set1(0.999f), y = set1(1e-3f * static_cast<float>(iterations));
  for (int64_t i = 0; i < iterations; ++i) {
    QWEN2VL_UNROLL
    for (int j = 0; j < kChains; ++j) acc[j] = vfmaq_f32(acc[j], x, y);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = add(acc[0], acc[j]);
  volatile float sink = first(acc[0]);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 4 * 2;
}

uint64_t read(const uint8_t* data, size_t bytes) {
  uint8x16_t acc[8];
  for (auto& a : acc) a = vdupq_n_u8(0);
  for (size_t i = 0; i < bytes; i += sizeof(acc)) {
    QWEN2VL_UNROLL
    for (int j = 0; j < 8; ++j) acc[j] = veorq_u8(acc[j], vld1q_u8(data + i + 16 * j));
  }
  for (int j = 1; j < 8; ++j) acc[0] = veorq_u8(acc[0], acc[j]);
  const uint64x2_t words = vreinterpretq_u64_u8(acc[0]);
  return vgetq_lane_u64(words, 0) ^ vgetq_lane_u64(words, 1);
}

}  // namespace

void add_peaks(KernelTable& table) { table.peaks = {int8_dot, fp32_fma, fp32_fma, read}; }

}  // namespace qwen2vl::cpu::neon
