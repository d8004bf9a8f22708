#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace qwen2vl {
namespace {

void require(bool ok, const char* name, double value, const char* expected) {
  if (!ok)
    throw std::invalid_argument(std::string(name) + ": expected " + expected + ", found " +
                                std::to_string(value));
}

}  // namespace

Error damaged_logits() { return Error("the model's logits are not numbers: the weights are damaged"); }

Sampler::Sampler(const SamplingParams& params) : params_(params), state_(params.seed) {
  require(params.temperature >= 0 && std::isfinite(params.temperature), "temperature", params.temperature,
          "a number of 0 or more");
  require(params.top_k >= 0, "top_k", static_cast<double>(params.top_k), "0 (all) or more");
  require(params.top_p > 0 && params.top_p <= 1, "top_p", params.top_p, "a number in (0, 1]");
  require(params.min_p >= 0 && params.min_p < 1, "min_p", params.min_p, "a number in [0, 1)");
  require(params.repetition_penalty > 0 && std::isfinite(params.repetition_penalty), "repetition_penalty",
          params.repetition_penalty, "a positive number");
}

bool Sampler::is_greedy() const {
  return (params_.temperature == 0 || params_.top_k == 1) && params_.repetition_penalty == 1;
}

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): 53 bits to [0, 1).
double Sampler::uniform() {
  uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> previous) {
  std::span<const float> scores = logits;
  if (params_.repetition_penalty != 1.0f) {
    scores_.assign(logits.begin(), logits.end());
    for (int32_t id : previous) {
      if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
      const float logit = logits[id];  // the original, so that a token seen twice is not punished twice
      scores_[id] = logit > 0 ? logit / params_.repetition_penalty : logit * params_.repetition_penalty;
    }
    scores = scores_;
  }
  int32_t best = -1;
  for (size_t i = 0; i < scores.size(); ++i)
    if (!std::isnan(scores[i]) && (best < 0 || scores[i] > scores[best])) best = static_cast<int32_t>(i);
  if (best < 0 || !std::isfinite(scores[best])) throw damaged_logits();
  if (params_.temperature == 0 || params_.top_k == 1) return best;

  // Candidates, best first; equal logits by id, so that the order is the same everywhere.
  order_.clear();
  for (size_t i = 0; i < scores.size(); ++i)
    if (!std::isnan(scores[i])) order_.push_back(static_cast<int32_t>(i));
  const auto before = [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  };
  if (params_.top_k > 0 && static_cast<size_t>(params_.top_k) < order_.size()) {
    std::partial_sort(order_.begin(), order_.begin() + params_.top_k, order_.end(), before);
    order_.resize(params_.top_k);
  } else {
    std::sort(order_.begin(), order_.end(), before);
  }
  probabilities_.resize(order_.size());
  double total = 0;
  for (size_t i = 0; i < order_.size(); ++i) {
    probabilities_[i] =
        std::exp((static_cast<double>(scores[order_[i]]) - scores[best]) / params_.temperature);
    total += probabilities_[i];
  }
  // top_p keeps the fewest tokens whose probability reaches it; the likeliest always stays.
  size_t kept = order_.size();
  double sum = 0;
  if (params_.top_p < 1)
    for (size_t i = 0; i < order_.size(); ++i) {
      sum += probabilities_[i];
      if (sum >= params_.top_p * total) {
        kept = i + 1;
        break;
      }
    }
  while (kept > 1 && probabilities_[kept - 1] < params_.min_p * probabilities_[0]) --kept;

  total = 0;
  for (size_t i = 0; i < kept; ++i) total += probabilities_[i];
  double draw = uniform() * total;
  for (size_t i = 0; i < kept; ++i) {
    draw -= probabilities_[i];
    if (draw < 0) return order_[i];
  }
  return order_[kept - 1];
}

}  // namespace qwen2vl
