// Q6_K: 16 sub-blocks of 16 values. Searched is, per sub-block, the scale with the least square error (all
// values weigh the same: that is the error of a dot product with activations about which nothing is known).
// With integers q for values x, the error is sum(x^2) minus
//     gain(s) = s * (2 * sum(x * q) - s * sum(q^2)),
// which is largest, sum(x * q)^2 / sum(q^2), at s = sum(x * q) / sum(q^2).

#include "quant/quantize_q6_k.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "base/half.h"

namespace qwen2vl {
namespace {

constexpr int kSub = 16;  // values per sub-block, and sub-blocks per block
constexpr float kMaxF16 = 65504.0f;
constexpr float kLeastF16 = 0x1p-24f;  // the least float16 above 0
constexpr float kLargest = kMaxF16 * 128 * 32;

// The integer nearest to x / scale (ties to even) within the format's range, for quotients below 2^22: the
// last place of the sum is worth 1. Unlike nearbyint and a float clamp it vectorizes on every machine.
float integer(float x, float inverse_scale) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const int32_t q = std::bit_cast<int32_t>(x * inverse_scale + kMagic) - std::bit_cast<int32_t>(kMagic);
  return static_cast<float>(std::min(std::max(q, -32), 31));
}

struct Sums {
  float xq;  ///< sum(x * q)
  float qq;  ///< sum(q^2)

  float best_scale() const { return xq / qq; }
  float best_gain() const { return xq * best_scale(); }
  float gain(float scale) const { return scale * (2 * xq - scale * qq); }
};

Sums project(const float* x, float inverse_scale) {
  float xq[4] = {}, qq[4] = {};  // four lanes: a float sum vectorizes only where its order says so
  for (int i = 0; i < kSub; i += 4) {
    for (int lane = 0; lane < 4; ++lane) {
      const float q = integer(x[i + lane], inverse_scale);
      xq[lane] += x[i + lane] * q;
      qq[lane] += q * q;
    }
  }
  return {(xq[0] + xq[1]) + (xq[2] + xq[3]), (qq[0] + qq[1]) + (qq[2] + qq[3])};
}

/// The scale for one sub-block, free of the format's 8 bits. The value of largest magnitude goes near -32,
/// the longer side of the range, hence the sign. Tried are -33 to -28 in halves: on Gaussian values that
/// leaves 8 % less error than -32.9 to -31.1 in tenths, and halving the step again gains under 1 %.
float search_scale(const float* x) {
  float extreme = 0;
  for (int i = 0; i < kSub; ++i) {
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  }
  if (std::fabs(extreme) < kLeastF16 / 2) return 0;  // nearer to 0 than to the least scale
  float best_scale = 0, best_gain = 0;
  for (float target = -33.0f; target <= -28.0f; target += 0.5f) {
    const Sums sums = project(x, target / extreme);
    if (sums.best_gain() > best_gain) {
      best_gain = sums.best_gain();
      best_scale = sums.best_scale();
    }
  }
  return best_scale;
}

/// The block's d, such that the largest scale becomes about -128, again the longer side.
uint16_t block_scale(const std::array<float, kSub>& scales) {
  const float extreme = *std::max_element(scales.begin(), scales.end(),
                                          [](float a, float b) { return std::fabs(a) < std::fabs(b); });
  if (extreme == 0) return 0;
  const float size = std::clamp(std::fabs(extreme) / 128, kLeastF16, kMaxF16);
  return f32_to_f16(std::copysign(size, -extreme));
}

/// The integer near scale / d with the least error; 0 where none is better than zeros.
int choose_sub_scale(const float* x, float scale, float d) {
  const int nearest = static_cast<int>(std::lround(std::clamp(scale / d, -128.0f, 127.0f)));
  int best = 0;
  float best_gain = 0;
  for (int candidate = std::max(nearest - 1, -128); candidate <= std::min(nearest + 1, 127); ++candidate) {
    if (candidate == 0) continue;
    const float step = d * static_cast<float>(candidate);
    const float gain = project(x, 1 / step).gain(step);
    if (gain > best_gain) {
      best_gain = gain;
      best = candidate;
    }
  }
  return best;
}

void pack(const std::array<uint8_t, kBlock256>& q, Block<DType::Q6_K>* out) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* from = q.data() + half * 128;
    for (int l = 0; l < 32; ++l) {
      const uint8_t a = from[l], b = from[l + 32], c = from[l + 64], e = from[l + 96];
      out->ql[64 * half + l] = static_cast<uint8_t>((a & 15) | (c & 15) << 4);
      out->ql[64 * half + 32 + l] = static_cast<uint8_t>((b & 15) | (e & 15) << 4);
      out->qh[32 * half + l] = static_cast<uint8_t>(a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6);
    }
  }
}

}  // namespace

void quantize_q6_k(const float* values, Block<DType::Q6_K>* out) {
  std::array<float, kBlock256> x;
  for (int i = 0; i < kBlock256; ++i) x[i] = std::min(std::max(values[i], -kLargest), kLargest);

  std::array<float, kSub> scales;
  for (int sub = 0; sub < kSub; ++sub) scales[sub] = search_scale(x.data() + sub * kSub);
  out->d = block_scale(scales);
  const float d = f16_to_f32(out->d);

  std::array<uint8_t, kBlock256> q;
  for (int sub = 0; sub < kSub; ++sub) {
    const float* from = x.data() + sub * kSub;
    const int scale = scales[sub] == 0 ? 0 : choose_sub_scale(from, scales[sub], d);
    out->scales[sub] = static_cast<int8_t>(scale);
    const float inverse = scale == 0 ? 0 : 1 / (d * static_cast<float>(scale));
    for (int i = 0; i < kSub; ++i) q[sub * kSub + i] = static_cast<uint8_t>(integer(from[i], inverse) + 32);
  }
  pack(q, out);
}

}  // namespace qwen2vl
