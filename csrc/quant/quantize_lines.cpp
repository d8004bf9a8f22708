// Super-blocks of 256 values whose parts have a scale and a minimum of a few bits, in units of the block's.

#include <algorithm>
#include <limits>

#include "base/half.h"
#include "quant/quantize_blocks.h"
#include "quant/search.h"

namespace qwen2vl {
namespace {

/// A block of kBlock256 / kSize parts with levels 0 to kHigh; scales and minima are 0 to kMost.
template <int kSize, int kHigh, int kMost>
class LineBlock {
 public:
  static constexpr int kParts = kBlock256 / kSize;

  LineBlock(const float* values, const float* weights) {
    for (int p = 0; p < kParts; ++p)
      parts_[p / kLanes].load(p % kLanes, values + p * kSize, weights + p * kSize, kMaxF16 * kMost);
    Lines wanted[kQuads];
    for (int i = 0; i < kQuads; ++i) wanted[i] = search_lines<kHigh, Minimum::kNotNegative>(parts_[i]);
    d_ = unit(wanted, &Lines::scale);
    m_ = unit(wanted, &Lines::minimum);
    for (int round = 0; round < 2; ++round) {
      for (int i = 0; i < kQuads; ++i) integers_[i] = choose_integers(parts_[i], wanted[i]);
      refit();
      for (int i = 0; i < kQuads; ++i) wanted[i] = lines_of(integers_[i]);
    }
    for (int i = 0; i < kQuads; ++i) {
      const Quad inverted = inverse(wanted[i].scale);
      choose_levels<Levels>(parts_[i], inverted, wanted[i].minimum * inverted, levels_[i]);
    }
  }

  uint16_t d() const { return f32_to_f16(d_); }
  uint16_t m() const { return f32_to_f16(m_); }
  int scale(int p) const { return static_cast<int>(integers_[p / kLanes].scale[p % kLanes]); }
  int minimum(int p) const { return static_cast<int>(integers_[p / kLanes].minimum[p % kLanes]); }
  int level(int i) const {
    const int p = i / kSize;
    return static_cast<int>(levels_[p / kLanes][i % kSize][p % kLanes]);
  }

 private:
  static constexpr int kQuads = kParts / kLanes;
  using Levels = Integers<0, kHigh>;
  using Steps = Integers<0, kMost>;

  /// Above 0, as float16 holds it.
  static float as_f16(float value) { return f16_to_f32(f32_to_f16(std::clamp(value, kLeastF16, kMaxF16))); }

  static float unit(const Lines (&wanted)[kQuads], Quad Lines::* member) {
    float most = 0;
    for (const Lines& lines : wanted)
      for (int k = 0; k < kLanes; ++k) most = std::max(most, (lines.*member)[k]);
    return most == 0 ? 0 : as_f16(most / kMost);
  }

  Lines lines_of(const Lines& integers) const {
    return {all(d_) * integers.scale, all(m_) * integers.minimum};
  }

  /// Those near to `wanted` with the least error: of three scales, with the nearest minimum and with the one
  /// that is best for the levels that this gives.
  Lines choose_integers(const Parts<kSize>& parts, const Lines& wanted) const {
    const Quad per_d = inverse(all(d_)), per_m = inverse(all(m_)), weights = value_sums(parts).w;
    Lines best = {all(0), all(0)};
    Quad least = all(std::numeric_limits<float>::infinity());
    for (const float away : {0.0f, -1.0f, 1.0f}) {
      const Quad scale = Steps::nearest(Steps::nearest(wanted.scale * per_d) + all(away));
      Quad minimum = Steps::nearest(wanted.minimum * per_m);
      for (int round = 0; round < 2; ++round) {
        const Lines lines = lines_of({scale, minimum});
        const Rest found = rest<Levels>(parts, lines);
        const QuadMask better = found.error < least;
        least = select(better, found.error, least);
        best = {select(better, scale, best.scale), select(better, minimum, best.minimum)};
        minimum = Steps::nearest((lines.minimum - found.difference / weights) * per_m);
      }
    }
    return best;
  }

  /// d and m by least squares, with the integers and the levels as they are.
  void refit() {
    double ss = 0, sb = 0, bb = 0, xs = 0, xb = 0;  // sums of w: x' = d * s - m * b with s = scale * q
    for (int i = 0; i < kQuads; ++i) {
      const Lines lines = lines_of(integers_[i]);
      const Quad inverted = inverse(lines.scale);
      const LevelSums levels = level_sums<Levels>(parts_[i], inverted, lines.minimum * inverted);
      const ValueSums values = value_sums(parts_[i]);
      for (int k = 0; k < kLanes; ++k) {
        const double s = integers_[i].scale[k], b = integers_[i].minimum[k];
        ss += s * s * levels.wqq[k];
        sb += s * b * levels.wq[k];
        bb += b * b * values.w[k];
        xs += s * levels.wxq[k];
        xb += b * values.wx[k];
      }
    }
    const double determinant = ss * bb - sb * sb;
    if (!(determinant > 1e-6 * ss * bb)) return;
    const double d = (xs * bb - xb * sb) / determinant, m = (xs * sb - xb * ss) / determinant;
    if (!(d > 0 && m > 0)) return;
    d_ = as_f16(static_cast<float>(d));
    m_ = as_f16(static_cast<float>(m));
  }

  Parts<kSize> parts_[kQuads];
  Lines integers_[kQuads];  // scales and minima in units of d and m
  float d_, m_;             // as float16 holds them
  Quad levels_[kQuads][kSize];
};

/// What Q4_K and Q5_K have in common: scales, minima and low bits.
template <typename Found, typename K>
void pack(const Found& found, K* out) {
  out->d = found.d();
  out->m = found.m();
  for (int p = 0; p < 4; ++p) {
    const int scale = found.scale(4 + p), minimum = found.minimum(4 + p);
    out->scales[p] = static_cast<uint8_t>(found.scale(p) | scale >> 4 << 6);
    out->scales[4 + p] = static_cast<uint8_t>(found.minimum(p) | minimum >> 4 << 6);
    out->scales[8 + p] = static_cast<uint8_t>((scale & 15) | (minimum & 15) << 4);
  }
  for (int j = 0; j < 4; ++j) {
    for (int l = 0; l < 32; ++l) {
      const int low = found.level(64 * j + l), high = found.level(64 * j + 32 + l);
      out->qs[32 * j + l] = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
    }
  }
}

}  // namespace

void quantize_block(const float* x, const float* w, Block<DType::Q2_K>* out) {
  const LineBlock<16, 3, 15> found(x, w);
  out->d = found.d();
  out->m = found.m();
  for (int p = 0; p < 16; ++p) out->scales[p] = static_cast<uint8_t>(found.scale(p) | found.minimum(p) << 4);
  for (int half = 0; half < 2; ++half) {
    for (int l = 0; l < 32; ++l) {
      int bits = 0;
      for (int j = 0; j < 4; ++j) bits |= found.level(128 * half + 32 * j + l) << 2 * j;
      out->qs[32 * half + l] = static_cast<uint8_t>(bits);
    }
  }
}

void quantize_block(const float* x, const float* w, Block<DType::Q4_K>* out) {
  pack(LineBlock<32, 15, 63>(x, w), out);
}

void quantize_block(const float* x, const float* w, Block<DType::Q5_K>* out) {
  const LineBlock<32, 31, 63> found(x, w);
  pack(found, out);
  for (int l = 0; l < 32; ++l) {
    int bits = 0;
    for (int p = 0; p < 8; ++p) bits |= found.level(32 * p + l) >> 4 << p;
    out->qh[l] = static_cast<uint8_t>(bits);
  }
}

}  // namespace qwen2vl
