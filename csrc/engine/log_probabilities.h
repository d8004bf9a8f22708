#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace qwen2vl {

/// Natural logarithms of what the model holds probable: before any penalty, bias, mask or temperature.
struct LogProbabilities {
  struct Of {
    int32_t token;
    double value;
  };
  double value = 0;     ///< of the token asked for
  std::vector<Of> top;  ///< the likeliest, equal ones by their ids
};

/// Throws Error where no logit is a number, std::invalid_argument for a token that is none. The same on every
/// machine to within 1e-9; what has no number is never among the likeliest.
LogProbabilities log_probabilities(std::span<const float> logits, int32_t token, size_t top);

}  // namespace qwen2vl
