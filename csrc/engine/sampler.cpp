#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace qwen2vl {
namespace {

void require(bool ok, const char* name, double value, const char* expected) {
  if (!ok)
    throw std::invalid_argument(std::string(name) + ": expected " + expected + ", found " +
                                std::to_string(value));
}

// -inf where none is a number. Lanes of its own let compilers vectorize it.
float largest(std::span<const float> values) {
  std::array<float, 16> lanes;
  lanes.fill(-std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + lanes.size() <= values.size(); i += lanes.size())
    for (size_t j = 0; j < lanes.size(); ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  for (; i < values.size(); ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
  return *std::max_element(lanes.begin(), lanes.end());
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

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> previous,
                        std::span<const uint8_t> allowed) {
  if (!allowed.empty() && allowed.size() != logits.size())
    throw std::invalid_argument("allowed: expected " + std::to_string(logits.size()) + " tokens, found " +
                                std::to_string(allowed.size()));
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
  if (!allowed.empty()) {
    if (!std::isfinite(largest(scores))) throw damaged_logits();
    if (scores.data() != scores_.data()) scores_.assign(scores.begin(), scores.end());
    for (size_t i = 0; i < allowed.size(); ++i)
      if (allowed[i] == 0) scores_[i] = -std::numeric_limits<float>::infinity();
    scores = scores_;
  }
  const float best = largest(scores);
  if (!std::isfinite(best)) {
    if (allowed.empty()) throw damaged_logits();
    throw std::invalid_argument("allowed: expected a token that may be drawn, found none");
  }
  if (params_.temperature == 0 || params_.top_k == 1)
    return static_cast<int32_t>(std::find(scores.begin(), scores.end(), best) - scores.begin());

  distribution_.assign(scores, best, params_.temperature);
  Prefix kept = params_.top_k > 0 ? distribution_.first(params_.top_k) : distribution_.all();
  const auto cut = [&](const Prefix& prefix) {
    if (prefix.count < kept.count) kept = prefix;
  };
  if (params_.top_p < 1) cut(distribution_.reaching(params_.top_p * kept.mass));
  if (params_.min_p > 0) cut(distribution_.at_least(params_.min_p));
  // A double below 1 times the mass is below the mass, after rounding too.
  return distribution_.exceeding(uniform() * kept.mass).last;
}

}  // namespace qwen2vl
