#pragma once

// Steps of a softmax whose probabilities are bf16, written once; needs the including instruction set's
// simd.h.

#include <math.h>

#include "cpu/kernels/simd/exp.h"

namespace qwen2vl::cpu {
namespace {

/// out = 2^(scores * slope + offset), of numbers that are 0 at most; returns the sum. The instruction set's
/// own.
inline float row_exponentials(const float* scores, int64_t n, Vec slope, Vec offset, uint16_t* out);

/// 2^x for x in [-1/2, 1/2]: the cubic of the least greatest relative error, 7.5e-5.
inline Vec exp2_fraction(Vec x) {
  Vec p = fma(set1(0.0551713211f), x, set1(0.242610541f));
  p = fma(p, x, set1(0.693260986f));
  return fma(p, x, set1(0.999928109f));
}

/// Vectors of a row's largest elements: the largest of them is the row's.
inline Vec row_maximum(const float* scores, int64_t n) {
  const Vec lowest = set1(-INFINITY);
  Vec m0 = lowest, m1 = lowest;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    m0 = max(load(scores + i), m0);
    m1 = max(load(scores + i + kLanes), m1);
  }
  for (; i < n; i += kLanes)
    m0 = max(n - i >= kLanes ? load(scores + i) : load_first(scores + i, n - i, lowest), m0);
  return max(m0, m1);
}

/// All maxima before the first exponential: a row alone would wait for its own.
inline void softmax_steps_bf16(const float* scores, int64_t stride, int64_t rows, int64_t n, float scale,
                               float* maxima, float* sums, float* factors, uint16_t* out,
                               int64_t out_stride) {
  constexpr float kLog2E = 1.44269504f;
  for (int64_t begin = 0; begin < rows; begin += kLanes) {
    const int64_t part = rows - begin < kLanes ? rows - begin : kLanes;
    alignas(64) float offsets[kLanes] = {};
    for (int64_t r = 0; r < part; ++r) offsets[r] = reduce_max(row_maximum(scores + (begin + r) * stride, n));
    const Vec before = load_first(maxima + begin, part, set1(0.0f));
    const Vec now = max(mul(load(offsets), set1(scale)), before);
    store_first(maxima + begin, now, part);
    store_first(factors + begin, exp(sub(before, now)), part);
    store(offsets, mul(now, set1(-kLog2E)));
    for (int64_t r = 0; r < part; ++r) {
      const int64_t row = begin + r;
      const float sum = row_exponentials(scores + row * stride, n, set1(scale * kLog2E), set1(offsets[r]),
                                         out + row * out_stride);
      sums[row] = sums[row] * factors[row] + sum;
    }
  }
}

}  // namespace
}  // namespace qwen2vl::cpu
