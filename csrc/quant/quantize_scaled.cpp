// Super-blocks of 256 values whose parts have a scale of a few bits, in units of the block's.

#include <algorithm>
#include <cmath>

#include "base/half.h"
#include "quant/quantize_blocks.h"
#include "quant/search.h"

namespace qwen2vl {
namespace {

/// A block of kBlock256 / kSize parts; scales are -kLongest to kLongest - 1.
template <typename Levels, int kSize, int kLongest>
class ScaledBlock {
 public:
  static constexpr int kParts = kBlock256 / kSize;

  ScaledBlock(const float* values, const float* weights, const Targets& targets) {
    constexpr float kLargest = -kMaxF16 * kLongest * Levels::kFirst;
    for (int p = 0; p < kParts; ++p)
      parts_[p / kLanes].load(p % kLanes, values + p * kSize, weights + p * kSize, kLargest);
    Quad wanted[kQuads];
    for (int i = 0; i < kQuads; ++i) wanted[i] = search_scales<Levels>(parts_[i], targets);
    d_ = unit(wanted);
    for (int round = 0; round < 2; ++round) {
      for (int i = 0; i < kQuads; ++i) integers_[i] = choose_integers(parts_[i], wanted[i]);
      refit();
      for (int i = 0; i < kQuads; ++i) wanted[i] = all(d_) * integers_[i];
    }
    for (int i = 0; i < kQuads; ++i) choose_levels<Levels>(parts_[i], inverse(wanted[i]), all(0), levels_[i]);
  }

  uint16_t d() const { return f32_to_f16(d_); }
  int scale(int p) const { return static_cast<int>(integers_[p / kLanes][p % kLanes]); }
  int level(int i) const {
    const int p = i / kSize;
    return static_cast<int>(levels_[p / kLanes][i % kSize][p % kLanes]);
  }

 private:
  static constexpr int kQuads = kParts / kLanes;
  using Steps = Integers<-kLongest, kLongest - 1>;

  static float as_f16(float value) {
    const float size = std::clamp(std::fabs(value), kLeastF16, kMaxF16);
    return f16_to_f32(f32_to_f16(std::copysign(size, value)));
  }

  /// Such that the largest scale becomes -kLongest, the longer side.
  static float unit(const Quad (&wanted)[kQuads]) {
    float extreme = 0;
    for (const Quad& scales : wanted)
      for (int k = 0; k < kLanes; ++k)
        extreme = std::fabs(scales[k]) > std::fabs(extreme) ? scales[k] : extreme;
    return extreme == 0 ? 0 : as_f16(extreme / -kLongest);
  }

  /// Of those next to `wanted` the one with the least error; 0 where none is better than zeros.
  Quad choose_integers(const Parts<kSize>& parts, Quad wanted) const {
    const Quad nearest = Steps::nearest(wanted * inverse(all(d_)));
    const QuadMask some = magnitude(wanted) > all(0);
    Quad best = all(0), best_gain = all(0);
    for (const float away : {-1.0f, 0.0f, 1.0f}) {
      const Quad tried = Steps::nearest(nearest + all(away)), scale = all(d_) * tried;
      const LevelSums sums = level_sums<Levels>(parts, inverse(scale));
      const Quad gain = scale * (all(2) * sums.wxq - scale * sums.wqq);
      const QuadMask better = (gain > best_gain) & some;
      best_gain = select(better, gain, best_gain);
      best = select(better, tried, best);
    }
    return best;
  }

  /// d by least squares, with the integers and the levels as they are.
  void refit() {
    double ss = 0, xs = 0;
    for (int i = 0; i < kQuads; ++i) {
      const LevelSums sums = level_sums<Levels>(parts_[i], inverse(all(d_) * integers_[i]));
      for (int k = 0; k < kLanes; ++k) {
        const double s = integers_[i][k];
        ss += s * s * sums.wqq[k];
        xs += s * sums.wxq[k];
      }
    }
    if (ss > 0) d_ = as_f16(static_cast<float>(xs / ss));
  }

  Parts<kSize> parts_[kQuads];
  Quad integers_[kQuads];  // scales in units of d
  float d_;                // as float16 holds it
  Quad levels_[kQuads][kSize];
};

// The value of largest magnitude goes near -32, the longer side of the range, hence the sign. On Gaussian
// values these leave 8 % less error than -32.9 to -31.1 in tenths; half the step gains under 1 % more.
constexpr Targets kTargets3 = {-5.0f, -2.5f, 0.25f, 2};
constexpr Targets kTargets6 = {-33.0f, -28.0f, 0.5f, 0};

}  // namespace

void quantize_block(const float* x, const float* w, Block<DType::Q3_K>* out) {
  const ScaledBlock<Integers<-4, 3>, 16, 32> found(x, w, kTargets3);
  *out = {};
  out->d = found.d();
  for (int p = 0; p < 16; ++p) {
    const int scale = found.scale(p) + 32;
    out->scales[p % 8] |= static_cast<uint8_t>((scale & 15) << 4 * (p / 8));
    out->scales[8 + p % 4] |= static_cast<uint8_t>(scale >> 4 << 2 * (p / 4));
  }
  for (int v = 0; v < kBlock256; ++v) {
    const int q = found.level(v) + 4;
    out->qs[v / 128 * 32 + v % 32] |= static_cast<uint8_t>((q & 3) << 2 * (v / 32 % 4));
    out->hmask[v % 32] |= static_cast<uint8_t>(q >> 2 << v / 32);
  }
}

void quantize_block(const float* x, const float* w, Block<DType::IQ4_XS>* out) {
  const ScaledBlock<Iq4Levels, 32, 32> found(x, w, kIq4Targets);
  *out = {};
  out->d = found.d();
  for (int p = 0; p < 8; ++p) {
    const int scale = found.scale(p) + 32;
    out->scales_l[p / 2] |= static_cast<uint8_t>((scale & 15) << 4 * (p % 2));
    out->scales_h = static_cast<uint16_t>(out->scales_h | scale >> 4 << 2 * p);
    for (int l = 0; l < 16; ++l) {
      const int low = Iq4Levels::index(static_cast<float>(found.level(32 * p + l)));
      const int high = Iq4Levels::index(static_cast<float>(found.level(32 * p + 16 + l)));
      out->qs[16 * p + l] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

void quantize_block(const float* x, const float* w, Block<DType::Q6_K>* out) {
  const ScaledBlock<Integers<-32, 31>, 16, 128> found(x, w, kTargets6);
  out->d = found.d();
  for (int p = 0; p < 16; ++p) out->scales[p] = static_cast<int8_t>(found.scale(p));
  for (int half = 0; half < 2; ++half) {
    for (int l = 0; l < 32; ++l) {
      int q[4];
      for (int j = 0; j < 4; ++j) q[j] = found.level(128 * half + 32 * j + l) + 32;
      out->ql[64 * half + l] = static_cast<uint8_t>((q[0] & 15) | (q[2] & 15) << 4);
      out->ql[64 * half + 32 + l] = static_cast<uint8_t>((q[1] & 15) | (q[3] & 15) << 4);
      out->qh[32 * half + l] =
          static_cast<uint8_t>(q[0] >> 4 | (q[1] >> 4) << 2 | (q[2] >> 4) << 4 | (q[3] >> 4) << 6);
    }
  }
}

}  // namespace qwen2vl
