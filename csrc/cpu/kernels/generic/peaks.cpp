#include <cstring>

#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::generic {
namespace {

// What a compiler makes of plain loops over arrays in the first-level cache: a ceiling for plain code, not
// for the processor.

/// Of 16-bit products, of which baselines have pairs added up.
double int8_dot(int64_t iterations) {
  constexpr int kLength = 256, kShifts = 64;
  int16_t x[kLength], y[kLength + kShifts];
  for (int i = 0; i < kLength; ++i) x[i] = static_cast<int8_t>(i * 7 + iterations);
  for (int i = 0; i < kLength + kShifts; ++i) y[i] = static_cast<int8_t>(i * 5 - iterations);
  int32_t sum = 0;
  for (int64_t i = 0; i < iterations; ++i) {
    const int16_t* shifted = y + i % kShifts;  // another product each time, so that none is left out
    int32_t dot = 0;
    for (int j = 0; j < kLength; ++j) dot += x[j] * shifted[j];
    sum ^= dot;
  }
  volatile int32_t sink = sum;
  (void)sink;
  return static_cast<double>(iterations) * kLength * 2;
}

double fp32_fma(int64_t iterations) {
  constexpr int kChains = 32;
  float acc[kChains];
  for (float& a : acc) a = 1.0f;
  const float x = 0.999f, y = 1e-3f * static_cast<float>(iterations);
  for (int64_t i = 0; i < iterations; ++i)
    for (float& a : acc) a = a * x + y;
  volatile float sink = 0.0f;
  for (const float a : acc) sink = sink + a;
  return static_cast<double>(iterations) * kChains * 2;
}

uint64_t read(const uint8_t* data, size_t bytes) {
  uint64_t sum = 0;
  for (size_t i = 0; i < bytes; i += sizeof(sum)) {
    uint64_t word;
    std::memcpy(&word, data + i, sizeof(word));
    sum += word;
  }
  return sum;
}

}  // namespace

void add_peaks(KernelTable& table) { table.peaks = {int8_dot, fp32_fma, fp32_fma, read}; }

}  // namespace qwen2vl::cpu::generic
