#pragma once

// Which scale (and minimum) gives a few values the least weighted square error, sum(w * (x - x')^2).
//
// With the values' levels q fixed, that scale is a matter of linear least squares; with the scale fixed, each
// value's level is the nearest one. So candidates come from the range of the values, each is fitted to the
// levels that it gives, and the best is fitted again.
//
// Four parts of a block (or four blocks) are searched side by side, a lane each: no sums go across lanes.

#include <algorithm>
#include <iterator>
#include <limits>

#include "quant/block_types.h"
#include "quant/quad.h"

namespace qwen2vl {

inline constexpr float kMaxF16 = 65504.0f;
inline constexpr float kLeastF16 = 0x1p-24f;  ///< the least float16 above 0

/// The integers kLow to kHigh as levels.
template <int kLow, int kHigh>
struct Integers {
  static constexpr float kFirst = kLow, kLast = kHigh;

  /// The level nearest to v. Rounds where the last place of the sum is worth 1; what is 2^22 and more is cut.
  static Quad nearest(Quad v) {
    const Quad magic = all(12582912.0f);  // 1.5 * 2^23
    return min(max((v + magic) - magic, all(kFirst)), all(kLast));
  }
};

/// IQ4's values as levels.
struct Iq4Levels {
  static constexpr float kFirst = kIq4[0];

  static Quad nearest(Quad v) {
    Quad level = all(kFirst);
    for (int i = 1; i < 16; ++i) level = select(v > all((kIq4[i - 1] + kIq4[i]) * 0.5f), all(kIq4[i]), level);
    return level;
  }

  /// Which of the values a level is.
  static int index(float level) {
    return static_cast<int>(std::lower_bound(std::begin(kIq4), std::end(kIq4), level) - std::begin(kIq4));
  }
};

/// kSize values and their weights in each lane.
template <int kSize>
struct Parts {
  Quad x[kSize], w[kSize];

  /// Magnitudes are cut to `largest`.
  void load(int lane, const float* values, const float* weights, float largest) {
    for (int i = 0; i < kSize; ++i) {
      x[i][lane] = std::min(std::max(values[i], -largest), largest);
      w[i][lane] = weights[i];
    }
  }
};

/// 1 / scale, and 0 for 0.
inline Quad inverse(Quad scale) {
  const QuadMask some = magnitude(scale) > all(0);
  return select(some, all(1) / select(some, scale, all(1)), all(0));
}

/// Sums over each lane's values with levels q.
struct LevelSums {
  Quad wq, wqq, wxq;  ///< of w * q, w * q^2, w * x * q
};

/// With the levels nearest to x * inverse + offset.
template <typename Levels, int kSize>
LevelSums level_sums(const Parts<kSize>& parts, Quad inverse, Quad offset = all(0)) {
  LevelSums sums = {all(0), all(0), all(0)};
  for (int i = 0; i < kSize; ++i) {
    const Quad q = Levels::nearest(parts.x[i] * inverse + offset), weighted = parts.w[i] * q;
    sums.wq += weighted;
    sums.wqq += weighted * q;
    sums.wxq += weighted * parts.x[i];
  }
  return sums;
}

/// Writes the same levels.
template <typename Levels, int kSize>
void choose_levels(const Parts<kSize>& parts, Quad inverse, Quad offset, Quad* q) {
  for (int i = 0; i < kSize; ++i) q[i] = Levels::nearest(parts.x[i] * inverse + offset);
}

/// Sums over each lane's values.
struct ValueSums {
  Quad w, wx;
};

template <int kSize>
ValueSums value_sums(const Parts<kSize>& parts) {
  ValueSums sums = {all(0), all(0)};
  for (int i = 0; i < kSize; ++i) {
    sums.w += parts.w[i];
    sums.wx += parts.w[i] * parts.x[i];
  }
  return sums;
}

/// x' = scale * q - minimum.
struct Lines {
  Quad scale, minimum;
};

/// What lines leave of the values, each with its nearest level.
struct Rest {
  Quad error;       ///< sum(w * (x - x')^2)
  Quad difference;  ///< sum(w * (x - x'))
};

template <typename Levels, int kSize>
Rest rest(const Parts<kSize>& parts, const Lines& lines) {
  const Quad inverted = inverse(lines.scale), offset = lines.minimum * inverted;
  Rest rest = {all(0), all(0)};
  for (int i = 0; i < kSize; ++i) {
    const Quad q = Levels::nearest(parts.x[i] * inverted + offset);
    const Quad e = parts.x[i] - (lines.scale * q - lines.minimum), we = parts.w[i] * e;
    rest.error += we * e;
    rest.difference += we;
  }
  return rest;
}

enum class Minimum { kAny, kNotNegative };

/// The lines for levels 0 to kHigh.
template <int kHigh, Minimum kKind, int kSize>
Lines search_lines(const Parts<kSize>& parts) {
  constexpr bool kCut = kKind == Minimum::kNotNegative;
  const ValueSums sums = value_sums(parts);
  Quad low = kCut ? min(parts.x[0], all(0)) : parts.x[0], high = parts.x[0];
  for (int i = 1; i < kSize; ++i) {
    low = min(low, parts.x[i]);
    high = max(high, parts.x[i]);
  }
  Lines best = {all(0), all(0) - low};  // where there is no range
  Quad best_gain = all(-std::numeric_limits<float>::infinity());
  const auto fit = [&](Quad inverse, Quad offset) {
    const LevelSums levels = level_sums<Integers<0, kHigh>>(parts, inverse, offset);
    const Quad determinant = sums.w * levels.wqq - levels.wq * levels.wq;
    const Quad sloped = (sums.w * levels.wxq - sums.wx * levels.wq) / determinant;
    const Quad constant = (sums.wx - sloped * levels.wq) / sums.w;
    QuadMask is_line = determinant > all(0);
    if (kCut) is_line = is_line & (constant < all(0));
    const Quad scale = select(is_line, sloped, levels.wxq / levels.wqq);
    const Quad added = select(is_line, constant, all(0));
    const Quad gain = scale * levels.wxq + added * sums.wx;
    const QuadMask better = (gain > best_gain) & (scale > all(0));
    best_gain = select(better, gain, best_gain);
    best.scale = select(better, scale, best.scale);
    best.minimum = select(better, all(0) - added, best.minimum);
  };
  // The range is stretched over kHigh + wider levels, and moved. On Gaussian values four times as many
  // candidates gain half a percent, and half as many lose one.
  for (const float wider : {-1.2f, -0.6f, 0.0f, 0.6f, 1.2f}) {
    const Quad inverse = all(kHigh + wider) / (high - low);
    for (const float shift : {-0.4f, -0.2f, 0.0f, 0.2f, 0.4f})
      fit(inverse, all(shift - wider / 2) - low * inverse);
  }
  for (int round = 0; round < 2; ++round) {
    const Quad inverted = inverse(best.scale);
    fit(inverted, best.minimum * inverted);
  }
  return best;
}

/// Where search_scales looks: the value of largest magnitude is tried at the levels first, first + step, ...,
/// last, and what is best is fitted again `rounds` times.
struct Targets {
  float first, last, step;
  int rounds;
};

inline constexpr Targets kIq4Targets = {-143.0f, -99.0f, 4.0f, 2};

/// The scales, of any sign; 0 where all values are nearer to 0 than to the least float16.
template <typename Levels, int kSize>
Quad search_scales(const Parts<kSize>& parts, const Targets& targets) {
  Quad extreme = all(0), best = all(0), best_gain = all(0);
  for (const Quad x : parts.x) extreme = select(magnitude(x) > magnitude(extreme), x, extreme);
  const QuadMask some = magnitude(extreme) > all(kLeastF16 / 2);
  const auto fit = [&](Quad inverse) {
    const LevelSums sums = level_sums<Levels>(parts, inverse);
    const Quad scale = sums.wxq / sums.wqq, gain = sums.wxq * scale;
    const QuadMask better = (gain > best_gain) & some;
    best_gain = select(better, gain, best_gain);
    best = select(better, scale, best);
  };
  for (float target = targets.first; target <= targets.last; target += targets.step)
    fit(all(target) / extreme);
  for (int round = 0; round < targets.rounds; ++round) fit(inverse(best));
  return best;
}

}  // namespace qwen2vl
