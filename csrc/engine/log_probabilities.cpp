#include "engine/log_probabilities.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "engine/distribution.h"
#include "engine/sampler.h"

namespace qwen2vl {

LogProbabilities log_probabilities(std::span<const float> logits, int32_t token, size_t top) {
  if (token < 0 || static_cast<size_t>(token) >= logits.size())
    throw std::invalid_argument("token: expected an id below " + std::to_string(logits.size()) + ", found " +
                                std::to_string(token));
  const float best = largest(logits);
  if (!std::isfinite(best)) throw damaged_logits();
  Distribution distribution;
  distribution.assign(logits, best, 1);
  const double log_sum = best + std::log(distribution.all().mass);
  LogProbabilities found{logits[token] - log_sum, {}};

  std::vector<int32_t> likeliest;
  const auto before = [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  for (size_t i = 0; top > 0 && i < logits.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    if (std::isnan(logits[i]) || (likeliest.size() == top && !before(id, likeliest.back()))) continue;
    if (likeliest.size() == top) likeliest.pop_back();
    likeliest.insert(std::upper_bound(likeliest.begin(), likeliest.end(), id, before), id);
  }
  for (const int32_t id : likeliest) found.top.push_back({id, logits[id] - log_sum});
  return found;
}

}  // namespace qwen2vl
