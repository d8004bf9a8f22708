#include "engine/distribution.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

namespace qwen2vl {
namespace {

constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr size_t kPerOctave = 64;
constexpr size_t kLast = 52 * kPerOctave;  // the bucket of all that counts as 0; the sums fit in 48 KiB of L1
constexpr size_t kFew = 48;                // candidates are sorted at once; more are parted first
constexpr size_t kParts = 1024;

// Added to a small number, leaves the nearest integer in the low bits.
constexpr double kRound = 0x1.8p52;

uint64_t bits(double value) { return std::bit_cast<uint64_t>(value); }

// 2^(-x / kPerOctave) of x = depth - its bucket, |x| <= 1/2, in units of 2^-32: sums of 2^31 tokens' fit.
// Taylor's polynomial of degree 3 is off by less than (ln 2 / 128)^4 / 24 = 4e-11.
uint64_t weight_at(double depth) {
  constexpr double c1 = -kLn2 / kPerOctave, c2 = c1 * c1 / 2, c3 = c2 * c1 / 3;
  constexpr double kUnits = 0x1p20;  // doubles are 2^-32 apart there
  const double x = depth - ((depth + kRound) - kRound);
  return bits(1 + x * (c1 + x * (c2 + x * c3)) + kUnits) - bits(kUnits);
}

// 2^(-i / kPerOctave); std::exp2 may differ from machine to machine.
double part_of_octave(size_t i) {
  double sum = 1, term = 1;
  for (int n = 1; n < 20; ++n) sum += term *= -kLn2 * static_cast<double>(i) / kPerOctave / n;
  return sum;
}

}  // namespace

Distribution::Distribution() : unit_(kLast + 1), weights_(kLast + 1), counts_(kLast + 1) {
  for (size_t b = 0; b < kLast; ++b)
    unit_[b] = b < kPerOctave ? 0x1p-32 * part_of_octave(b) : unit_[b - kPerOctave] / 2;
}

void Distribution::Sum::add(const Sum& other) {
  count += other.count;
  weight += other.weight;
}

void Distribution::assign(std::span<const float> scores, float best, float temperature) {
  scores_ = scores;
  best_ = best;
  per_logit_ = kPerOctave * kLog2E / temperature;
  std::fill(weights_.begin(), weights_.end(), 0);
  std::fill(counts_.begin(), counts_.end(), 0);
  bucket_.resize(scores.size());
  constexpr size_t kBlock = 256;
  std::array<double, kBlock> rounded;
  std::array<uint64_t, kBlock> weight;
  for (size_t begin = 0; begin < scores.size(); begin += kBlock) {
    const size_t n = std::min(kBlock, scores.size() - begin);
    for (size_t i = 0; i < n; ++i) {
      const double at = depth(scores[begin + i]);
      rounded[i] = at + kRound;
      weight[i] = weight_at(at);
    }
    for (size_t i = 0; i < n; ++i) {
      const auto bucket = static_cast<uint16_t>(bits(rounded[i]));
      bucket_[begin + i] = bucket;
      weights_[bucket] += weight[i];
      ++counts_[bucket];
    }
  }
}

Prefix Distribution::plus(const Prefix& above, size_t bucket, const Sum& sum) const {
  return {above.count + sum.count, above.mass + unit_[bucket] * static_cast<double>(sum.weight), -1};
}

Prefix Distribution::all() const {
  Prefix sum;
  for (size_t b = 0; b < kLast; ++b) sum = plus(sum, b, {counts_[b], weights_[b]});
  return sum;
}

Prefix Distribution::first(int64_t count) {
  return find([&](const Prefix& prefix) { return prefix.count >= count; });
}

Prefix Distribution::reaching(double mass) {
  return find([&](const Prefix& prefix) { return prefix.mass >= mass; });
}

Prefix Distribution::exceeding(double mass) {
  return find([&](const Prefix& prefix) { return prefix.mass > mass; });
}

Prefix Distribution::at_least(double ratio) {
  const double deepest = -std::log2(ratio) * kPerOctave;
  Prefix sum;
  for (size_t b = 0; b < kLast; ++b) {
    if (static_cast<double>(b) + 0.5 < deepest) {
      sum = plus(sum, b, {counts_[b], weights_[b]});
      continue;
    }
    collect(b);
    std::erase_if(candidates_, [&](const Candidate& c) { return depth(c.score) > deepest; });
    Sum part;
    for (const Candidate& c : candidates_) part.add({1, c.weight});
    return plus(sum, b, part);
  }
  return sum;
}

// The tokens of a bucket, in the order of their ids.
void Distribution::collect(size_t bucket) {
  candidates_.clear();
  const auto wanted = static_cast<uint16_t>(bucket);
  constexpr size_t kBlock = 64;
  for (size_t begin = 0; begin < bucket_.size(); begin += kBlock) {
    const size_t end = std::min(begin + kBlock, bucket_.size());
    uint16_t any = 0;
    for (size_t i = begin; i < end; ++i) any |= bucket_[i] == wanted;
    for (size_t i = begin; any && i < end; ++i)
      if (bucket_[i] == wanted)
        candidates_.push_back({scores_[i], static_cast<int32_t>(i), weight_at(depth(scores_[i]))});
  }
}

// The fewest tokens that are enough, or all of them.
template <typename Enough>
Prefix Distribution::find(const Enough& enough) {
  Prefix above;
  for (size_t b = 0; b < kLast; ++b) {
    if (counts_[b] == 0) continue;
    const Prefix next = plus(above, b, {counts_[b], weights_[b]});
    if (!enough(next)) {
      above = next;
      continue;
    }
    collect(b);
    const auto enough_here = [&](const Sum& sum) { return enough(plus(above, b, sum)); };
    Sum sum = narrow(enough_here);
    for (const Candidate& c : candidates_) {
      sum.add({1, c.weight});
      if (!enough_here(sum)) continue;
      Prefix found = plus(above, b, sum);
      found.last = c.id;
      return found;
    }
  }
  return above;
}

// Leaves a few candidates in order, the last token of the fewest that are enough among them. Returns the sum
// of those that stood before them.
template <typename Enough>
Distribution::Sum Distribution::narrow(const Enough& enough) {
  Sum passed;
  while (candidates_.size() > kFew) {
    float low = candidates_[0].score, high = low;
    for (const Candidate& c : candidates_) low = std::min(low, c.score), high = std::max(high, c.score);
    const bool equal = low == high;  // then they go by id, in which order collect() has found them
    const int32_t front = candidates_.front().id, back = candidates_.back().id;
    const double span = equal ? static_cast<double>(back) - front : static_cast<double>(high) - low;
    const double per_unit = (kParts - 1) / span;
    const auto part = [&](const Candidate& c) {
      const double at = equal ? static_cast<double>(c.id) - front : static_cast<double>(high) - c.score;
      return static_cast<size_t>(at * per_unit);
    };
    std::array<Sum, kParts> parts;
    for (const Candidate& c : candidates_) parts[part(c)].add({1, c.weight});
    size_t p = 0;
    for (; p + 1 < kParts; ++p) {
      Sum next = passed;
      next.add(parts[p]);
      if (enough(next)) break;
      passed = next;
    }
    std::erase_if(candidates_, [&](const Candidate& c) { return part(c) != p; });
  }
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) {
    return a.score != b.score ? a.score > b.score : a.id < b.id;
  });
  return passed;
}

}  // namespace qwen2vl
