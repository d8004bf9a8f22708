#include "cpu/kernels/i8mm/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/tile.h"

namespace qwen2vl::cpu::i8mm {
namespace {

constexpr int kChains = 24;  // latency up to 5, up to four a cycle, 32 registers

double int8_dot(int64_t iterations) {
  int32x4_t acc[kChains];
  for (auto& a : acc) a = set1_int(0);
  const int8x16_t x = vdupq_n_s8(static_cast<int8_t>(iterations)), y = vdupq_n_s8(3);
  for (int64_t i = 0; i < iterations; ++i) {
    QWEN2VL_UNROLL
    for (int j = 0; j < kChains; ++j) acc[j] = vmmlaq_s32(acc[j], x, y);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = bit_xor(acc[0], acc[j]);
  volatile int sink = vgetq_lane_s32(acc[0], 0);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 32 * 2;
}

double bf16_dot(int64_t iterations) {
  Vec acc[kChains];
  for (auto& a : acc) a = set1(0.0f);
  const auto x = vreinterpretq_bf16_f32(set1(1.0f));
  const auto y = vreinterpretq_bf16_f32(set1(1e-3f * static_cast<float>(iterations)));
  for (int64_t i = 0; i < iterations; ++i) {
    QWEN2VL_UNROLL
    for (int j = 0; j < kChains; ++j) acc[j] = vbfmmlaq_f32(acc[j], x, y);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = add(acc[0], acc[j]);
  volatile float sink = first(acc[0]);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 16 * 2;
}

}  // namespace

void add_peaks(KernelTable& table) {
  table.peaks.int8_dot = int8_dot;
  table.peaks.float_dot = bf16_dot;
}

}  // namespace qwen2vl::cpu::i8mm
