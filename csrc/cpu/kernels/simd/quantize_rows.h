#pragma once

// Rows in blocks of 8 bits, written once; needs the including instruction set's simd.h.

#include <math.h>
#include <string.h>

#include "cpu/kernels/kernel_table.h"

namespace qwen2vl::cpu {
namespace {

constexpr int kBlockVectors = static_cast<int>(kBlock32) / kLanes;

/// A block's integers and their corrections: the instruction set's own.
inline void store_block(const IntVec (&q)[kBlockVectors], const QuantizedRows& out, int64_t block);

/// The rounding, and what becomes of tiny or non-finite blocks: generic/quantize_rows.cpp.
inline void quantize_block(const float* x, const QuantizedRows& out, int64_t block) {
  // Compared as integers, magnitudes order as floats do, with infinity and NaN at the top.
  Vec v[kBlockVectors];
  IntVec bits = set1_int(0);
  for (int i = 0; i < kBlockVectors; ++i) {
    v[i] = load(x + kLanes * i);
    bits = max(bits, bit_and(as_int(v[i]), set1_int(0x7fffffff)));
  }
  const int32_t maximum_bits = reduce_max(bits);
  float maximum;
  memcpy(&maximum, &maximum_bits, sizeof maximum);

  const bool finite = maximum_bits < 0x7f800000;
  float inverse = 0.0f, scale = finite ? 0.0f : NAN;
  if (finite && maximum >= 1e-30f) {
    inverse = 127.0f / maximum;
    scale = maximum / 127.0f;
  }
  const IntVec keep = set1_int(finite ? -1 : 0);
  IntVec q[kBlockVectors];
  for (int i = 0; i < kBlockVectors; ++i) q[i] = bit_and(to_int(mul(v[i], set1(inverse))), keep);
  out.scales[block] = scale;
  store_block(q, out, block);
  if (out.planes == 1) return;
  // What these have left, in 256ths of the scale.
  for (int i = 0; i < kBlockVectors; ++i) {
    const Vec rest = fma(to_float(q[i]), set1(-scale), v[i]);
    const IntVec rounded = bit_and(to_int(mul(rest, set1(inverse * 256.0f))), keep);
    q[i] = max(min(rounded, set1_int(127)), set1_int(-127));
  }
  store_block(q, out, block + out.rows * (out.cols / kBlock32));
}

inline void quantize_rows(const float* x, int64_t x_stride, int64_t rows, const QuantizedRows& out,
                          int64_t row_begin) {
  const int64_t blocks = out.cols / kBlock32;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t block = (row_begin + i) * blocks;
    for (int64_t b = 0; b < blocks; ++b) quantize_block(x + i * x_stride + b * kBlock32, out, block + b);
  }
}

}  // namespace
}  // namespace qwen2vl::cpu
