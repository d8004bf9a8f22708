#pragma once

// What the integer attention does to rows of float32, written once. Needs the including instruction set's
// simd.h, with store_narrow(T*, const IntVec (&)[4]) of uint8_t and int16_t.

#include <math.h>

#include "cpu/kernels/simd/exp.h"
#include "cpu/kernels/simd/tile.h"

namespace qwen2vl::cpu {
namespace {

/// Vectors that are narrowed together.
constexpr int kTogether = 4;
constexpr int64_t kStep = kTogether * kLanes;
static_assert(kIntegerRoom % kStep == 0 && kPieceKeys % kStep == 0);

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// The elements before the n-th of a vector, then zeros.
inline Vec load_part(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : n <= 0 ? set1(0.0f) : load_first(p, n, set1(0.0f));
}

/// The largest of n scores, a multiple of kStep.
inline float piece_maximum(const float* scores, int64_t n) {
  Vec top[kTogether];
  QWEN2VL_UNROLL
  for (int j = 0; j < kTogether; ++j) top[j] = load(scores + j * kLanes);
  for (int64_t i = kStep; i < n; i += kStep) {
    QWEN2VL_UNROLL
    for (int j = 0; j < kTogether; ++j) top[j] = max(top[j], load(scores + i + j * kLanes));
  }
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

/// round(Largest * 2^x) for x <= 0. The cubic, for the fraction in [-1/2, 1/2], has the least greatest
/// relative error: 7.5e-5.
template <int Largest>
inline IntVec rounded_exp2(Vec x) {
  constexpr float kLargest = Largest;
  x = max(x, set1(-14.0f));  // less than half of 1 for either of them
  const Vec whole = round_even(x), fraction = sub(x, whole);
  Vec p = fma(set1(kLargest * 0.0551713211f), fraction, set1(kLargest * 0.242610541f));
  p = fma(p, fraction, set1(kLargest * 0.693260986f));
  p = fma(p, fraction, set1(kLargest * 0.999928109f));
  return to_int(mul(p, as_float(shift_left(add(to_int(whole), set1_int(127)), 23))));
}

/// A piece's probabilities; returns their sum.
template <int Largest, typename T>
inline float round_piece(const float* scores, int64_t n, float maximum, T* out) {
  const Vec top = set1(maximum);
  IntVec sums[kTogether];
  QWEN2VL_UNROLL
  for (int j = 0; j < kTogether; ++j) sums[j] = set1_int(0);
  for (int64_t i = 0; i < n; i += kStep) {
    IntVec p[kTogether];
    QWEN2VL_UNROLL
    for (int j = 0; j < kTogether; ++j) {
      p[j] = rounded_exp2<Largest>(sub(load(scores + i + j * kLanes), top));
      sums[j] = add(sums[j], p[j]);
    }
    store_narrow(out + i, p);
  }
  // At most kPieceKeys * kLargest16: exact in float32.
  return reduce_add(to_float(add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
}

/// All maxima before the first exponential: a row alone would wait for its own.
template <int Largest, typename T>
void softmax_steps(float* scores, int64_t stride, int64_t rows, int64_t n, float* maxima, float* sums,
                   float* factors, T* out, int64_t out_stride, float* scales, int64_t scales_stride) {
  constexpr int64_t kPieces = kIntegerKeys / kPieceKeys;
  constexpr float kLn2 = 0.693147181f;
  const int64_t room = round_up(n, kIntegerRoom), pieces = (n + kPieceKeys - 1) / kPieceKeys;
  const auto length = [&](int64_t piece) {
    return room - piece * kPieceKeys < kPieceKeys ? room - piece * kPieceKeys : kPieceKeys;
  };
  for (int64_t begin = 0; begin < rows; begin += kLanes) {
    const int64_t part = rows - begin < kLanes ? rows - begin : kLanes;
    alignas(64) float tops[kPieces][kLanes] = {}, steps[kPieces][kLanes] = {};
    const Vec before = load_part(maxima + begin, part);
    Vec now = before;
    for (int64_t r = 0; r < part; ++r) {
      float* row = scores + (begin + r) * stride;
      for (int64_t i = n; i < room; ++i) row[i] = -INFINITY;
      for (int64_t p = 0; p < pieces; ++p) tops[p][r] = piece_maximum(row + p * kPieceKeys, length(p));
    }
    for (int64_t p = 0; p < pieces; ++p) now = max(load(tops[p]), now);
    for (int64_t p = 0; p < pieces; ++p)
      store(steps[p], mul(exp(mul(sub(load(tops[p]), now), set1(kLn2))), set1(1.0f / Largest)));
    alignas(64) float shrunk[kLanes], highest[kLanes];
    store(shrunk, exp(mul(sub(before, now), set1(kLn2))));
    store(highest, now);
    for (int64_t r = 0; r < part; ++r) {
      const int64_t row = begin + r;
      float sum = sums[row] * shrunk[r];
      for (int64_t p = 0; p < pieces; ++p) {
        const int64_t at = p * kPieceKeys;
        sum += steps[p][r] * round_piece<Largest>(scores + row * stride + at, length(p), tops[p][r],
                                                  out + row * out_stride + at);
        scales[p * scales_stride + row] = steps[p][r];
      }
      sums[row] = sum;
      maxima[row] = highest[r];
      factors[row] = shrunk[r];
    }
  }
}

/// In float32, then rounded.
template <typename Value>
inline void round_row(int64_t n, int16_t* out, Value value) {
  for (int64_t i = 0; i < n; i += kStep) {
    IntVec q[kTogether];
    QWEN2VL_UNROLL
    for (int j = 0; j < kTogether; ++j) q[j] = to_int(value(i + j * kLanes));
    store_narrow(out + i, q);
  }
}

inline float quantize_i16(const float* x, const float* factors, int64_t n, float largest, int16_t* out) {
  const Vec zero = set1(0.0f);
  const auto product = [&](int64_t i) { return mul(load_part(x + i, n - i), load_part(factors + i, n - i)); };
  Vec top = zero, not_finite = zero;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = product(i);
    top = max(max(v, sub(zero, v)), top);
    not_finite = fma(v, zero, not_finite);
  }
  const float maximum = reduce_max(top) + reduce_add(not_finite);
  const Vec inverse = set1(maximum >= 1e-30f ? largest / maximum : 0.0f);
  round_row(n, out, [&](int64_t i) { return mul(product(i), inverse); });
  return maximum >= 1e-30f || maximum != maximum ? maximum / largest : 0.0f;
}

inline void round_i16(const float* x, const float* centers, const float* factors, int64_t n, int16_t* out) {
  round_row(n, out, [&](int64_t i) {
    const int64_t left = n - i;
    return mul(sub(load_part(x + i, left), load_part(centers + i, left)), load_part(factors + i, left));
  });
}

inline void set_integer_rows(KernelTable& table) {
  table.softmax_steps_u8 = softmax_steps<255, uint8_t>;
  table.softmax_steps_i16 = softmax_steps<kLargest16, int16_t>;
  table.quantize_i16 = quantize_i16;
  table.round_i16 = round_i16;
}

}  // namespace
}  // namespace qwen2vl::cpu
