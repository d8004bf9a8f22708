#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace qwen2vl {

/// The `count` likeliest tokens.
struct Prefix {
  int64_t count = 0;
  double mass = 0;    ///< their probabilities' sum, in units of the likeliest's
  int32_t last = -1;  ///< the least likely of them, where it was looked for
};

/// The tokens of one row of logits, the likeliest first and equal logits by id, without the vocabulary being
/// sorted: probabilities are summed in buckets of 1/64 octave, and only the bucket in which a prefix ends is
/// looked into. Sums within a bucket are of integers, sums of buckets go downwards, and nothing but basic
/// arithmetic is used: neither the order of additions nor the machine decides anything.
///
/// A probability has a relative error below 2e-10. Below 2^-52 of the likeliest's it counts as 0, as does
/// that of a logit that is NaN; such tokens are in no prefix.
class Distribution {
 public:
  Distribution();

  /// Probabilities in proportion to exp(score / temperature). `best` is the largest score, and finite. The
  /// scores must stay for the calls below.
  void assign(std::span<const float> scores, float best, float temperature);

  Prefix all() const;
  Prefix first(int64_t count);
  /// The fewest tokens with at least this mass, which must be at most that of all().
  Prefix reaching(double mass);
  /// The fewest tokens with more than this mass, which must be less than that of all().
  Prefix exceeding(double mass);
  /// Those with at least `ratio` of the likeliest's probability; 0 < ratio <= 1.
  Prefix at_least(double ratio);

 private:
  struct Candidate {
    float score;
    int32_t id;
    uint64_t weight;
  };
  struct Sum {
    int64_t count = 0;
    uint64_t weight = 0;
    void add(const Sum& other);
  };

  // How far a score is below the best, in buckets; NaN is in the last one.
  double depth(float score) const {
    const double last = static_cast<double>(unit_.size() - 1);  // a constant would keep gcc from vectorizing
    const double depth = (best_ - static_cast<double>(score)) * per_logit_;
    return depth < last ? depth : last;
  }
  Prefix plus(const Prefix& above, size_t bucket, const Sum& sum) const;
  void collect(size_t bucket);
  template <typename Enough>
  Prefix find(const Enough& enough);
  template <typename Enough>
  Sum narrow(const Enough& enough);

  std::span<const float> scores_;
  double best_ = 0, per_logit_ = 0;    // buckets per unit of the logits
  std::vector<double> unit_;           // probability that a weight of 1 has in each bucket; 0 in the last
  std::vector<uint64_t> weights_;      // of the tokens in each bucket
  std::vector<uint32_t> counts_;       // of the tokens in each bucket
  std::vector<uint16_t> bucket_;       // of each token
  std::vector<Candidate> candidates_;  // tokens of one bucket
};

}  // namespace qwen2vl
