#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace qwen2vl {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

void require(bool ok, const char* name, double value, const char* expected) {
  if (!ok)
    throw std::invalid_argument(std::string(name) + ": expected " + expected + ", found " +
                                std::to_string(value));
}

}  // namespace

// Lanes of its own let compilers vectorize it.
float largest(std::span<const float> values) {
  std::array<float, 16> lanes;
  lanes.fill(kNever);
  size_t i = 0;
  for (; i + lanes.size() <= values.size(); i += lanes.size())
    for (size_t j = 0; j < lanes.size(); ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  for (; i < values.size(); ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
  return *std::max_element(lanes.begin(), lanes.end());
}

Error damaged_logits() { return Error("the model's logits are not numbers: the weights are damaged"); }

Sampler::Sampler(const SamplingParams& params) : params_(params), state_(params.seed) {
  require(params.temperature >= 0 && std::isfinite(params.temperature), "temperature", params.temperature,
          "a number of 0 or more");
  require(params.top_k >= 0, "top_k", static_cast<double>(params.top_k), "0 (all) or more");
  require(params.top_p > 0 && params.top_p <= 1, "top_p", params.top_p, "a number in (0, 1]");
  require(params.min_p >= 0 && params.min_p < 1, "min_p", params.min_p, "a number in [0, 1)");
  require(params.repetition_penalty > 0 && std::isfinite(params.repetition_penalty), "repetition_penalty",
          params.repetition_penalty, "a positive number");
  require(std::isfinite(params.presence_penalty), "presence_penalty", params.presence_penalty, "a number");
  require(std::isfinite(params.frequency_penalty), "frequency_penalty", params.frequency_penalty, "a number");
  require(params.no_repeat_ngram_size >= 0, "no_repeat_ngram_size",
          static_cast<double>(params.no_repeat_ngram_size), "0 (off) or more");
  for (const TokenBias& b : params.logit_bias)
    require(std::isfinite(b.bias), "logit_bias", b.bias, "a number");
}

bool Sampler::is_greedy() const {
  return (params_.temperature == 0 || params_.top_k == 1) && !moves_logits();
}

bool Sampler::moves_logits() const {
  return params_.repetition_penalty != 1 || params_.presence_penalty != 0 || params_.frequency_penalty != 0 ||
         params_.no_repeat_ngram_size > 0 || !params_.logit_bias.empty();
}

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): 53 bits to [0, 1).
double Sampler::uniform() {
  uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

void Sampler::punish(std::span<const float> logits, std::span<const int32_t> previous, size_t prompt) {
  const auto known = [&](int32_t id) { return id >= 0 && static_cast<size_t>(id) < logits.size(); };
  if (params_.repetition_penalty != 1)
    for (const int32_t id : previous) {
      if (!known(id)) continue;
      const float logit = logits[id];  // the original, so that a token seen twice is not punished twice
      scores_[id] = logit > 0 ? logit / params_.repetition_penalty : logit * params_.repetition_penalty;
    }
  if (params_.presence_penalty == 0 && params_.frequency_penalty == 0) return;
  drawn_.assign(previous.begin() + static_cast<std::ptrdiff_t>(std::min(prompt, previous.size())),
                previous.end());
  std::sort(drawn_.begin(), drawn_.end());
  for (auto first = drawn_.begin(); first != drawn_.end();) {
    const auto last = std::upper_bound(first, drawn_.end(), *first);
    if (known(*first))
      scores_[*first] -=
          params_.presence_penalty + params_.frequency_penalty * static_cast<float>(last - first);
    first = last;
  }
}

void Sampler::add_bias() {
  for (const TokenBias& b : params_.logit_bias) {
    if (b.token < 0 || static_cast<size_t>(b.token) >= scores_.size())
      throw std::invalid_argument("logit_bias: expected token ids below " + std::to_string(scores_.size()) +
                                  ", found " + std::to_string(b.token));
    scores_[b.token] += b.bias;
  }
}

// What would complete tokens in a row that have come before.
void Sampler::forbid_repeated(std::span<const int32_t> previous) {
  const size_t n = static_cast<size_t>(params_.no_repeat_ngram_size);
  if (n == 0 || previous.size() < n) return;
  const std::span<const int32_t> end = previous.last(n - 1);
  for (size_t i = 0; i + n <= previous.size(); ++i) {
    const int32_t next = previous[i + n - 1];
    if (next >= 0 && static_cast<size_t>(next) < scores_.size() &&
        std::equal(end.begin(), end.end(), previous.begin() + static_cast<std::ptrdiff_t>(i)))
      scores_[next] = kNever;
  }
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> previous,
                        std::span<const uint8_t> allowed, size_t prompt) {
  if (!allowed.empty() && allowed.size() != logits.size())
    throw std::invalid_argument("allowed: expected " + std::to_string(logits.size()) + " tokens, found " +
                                std::to_string(allowed.size()));
  const bool excluding = !allowed.empty() || params_.no_repeat_ngram_size > 0;
  std::span<const float> scores = logits;
  if (excluding || moves_logits()) {
    if (!std::isfinite(largest(logits))) throw damaged_logits();
    scores_.assign(logits.begin(), logits.end());
    punish(logits, previous, prompt);
    add_bias();
    forbid_repeated(previous);
    for (size_t i = 0; i < allowed.size(); ++i)
      if (allowed[i] == 0) scores_[i] = kNever;
    scores = scores_;
  }
  const float best = largest(scores);
  if (!std::isfinite(best)) {
    if (!excluding) throw damaged_logits();
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
