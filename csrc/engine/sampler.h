#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/error.h"
#include "engine/distribution.h"

namespace qwen2vl {

struct SamplingParams {
  float temperature = 0;         ///< 0: greedy
  int64_t top_k = 0;             ///< 0: all
  float top_p = 1;               ///< nucleus sampling (arXiv 1904.09751)
  float min_p = 0;               ///< relative to the likeliest token (arXiv 2407.01082)
  float repetition_penalty = 1;  ///< CTRL's (arXiv 1909.05858), over every token so far
  uint64_t seed = 0;
};

/// Of logits that no token can be drawn from.
Error damaged_logits();

/// Draws tokens. Order, as in transformers: repetition penalty, temperature, top_k, top_p, min_p. Greedy
/// takes the first of equal logits. The same seed gives the same draws on every platform.
class Sampler {
 public:
  /// Throws std::invalid_argument for a parameter out of range.
  explicit Sampler(const SamplingParams& params);

  /// Always takes the first of the largest logits, whatever stands before.
  bool is_greedy() const;

  /// `previous`: the tokens that the repetition penalty looks at. `allowed`: as many as logits, 0 for those
  /// that must not be drawn; empty: all may. Throws Error where no logit is a number,
  /// std::invalid_argument where none is allowed.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> previous,
                 std::span<const uint8_t> allowed = {});

 private:
  double uniform();

  SamplingParams params_;
  uint64_t state_;
  std::vector<float> scores_;
  Distribution distribution_;
};

}  // namespace qwen2vl
