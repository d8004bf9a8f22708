#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/error.h"
#include "engine/distribution.h"

namespace qwen2vl {

/// What is added to a token's logit.
struct TokenBias {
  int32_t token = 0;
  float bias = 0;
};

struct SamplingParams {
  float temperature = 0;         ///< 0: greedy
  int64_t top_k = 0;             ///< 0: all
  float top_p = 1;               ///< nucleus sampling (arXiv 1904.09751)
  float min_p = 0;               ///< relative to the likeliest token (arXiv 2407.01082)
  float repetition_penalty = 1;  ///< CTRL's (arXiv 1909.05858), over every token so far
  float presence_penalty = 0;    ///< off the logit of a token that has been drawn; the prompt does not count
  float frequency_penalty = 0;   ///< off it for every time that it has been drawn
  int64_t no_repeat_ngram_size = 0;  ///< so many tokens in a row, the prompt's too, come once; 0: off
  std::vector<TokenBias> logit_bias = {};
  uint64_t seed = 0;
};

/// -inf where none is a number.
float largest(std::span<const float> values);

/// Of logits that no token can be drawn from.
Error damaged_logits();

/// Draws tokens. Order, as in transformers: repetition penalty, presence and frequency, bias, repeated
/// n-grams, temperature, top_k, top_p, min_p. Greedy takes the first of equal logits. The same seed gives the
/// same draws on every platform.
class Sampler {
 public:
  /// Throws std::invalid_argument for a parameter out of range.
  explicit Sampler(const SamplingParams& params);

  /// Always takes the first of the largest logits, whatever stands before.
  bool is_greedy() const;

  /// `previous`: the tokens so far, of which the first `prompt` were not drawn. `allowed`: as many as logits,
  /// 0 for those that must not be drawn; empty: all may. Throws Error where no logit is a number,
  /// std::invalid_argument where none may be drawn or a bias is of no token.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> previous,
                 std::span<const uint8_t> allowed = {}, size_t prompt = 0);

 private:
  double uniform();
  bool moves_logits() const;
  void punish(std::span<const float> logits, std::span<const int32_t> previous, size_t prompt);
  void add_bias();
  void forbid_repeated(std::span<const int32_t> previous);

  SamplingParams params_;
  uint64_t state_;
  std::vector<float> scores_;
  std::vector<int32_t> drawn_;  // in the order of their ids
  Distribution distribution_;
};

}  // namespace qwen2vl
