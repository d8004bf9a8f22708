#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "engine/sampler.h"

using namespace qwen2vl;

namespace {

using Ids = std::vector<int32_t>;
using Floats = std::vector<float>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// SplitMix64, as the sampler has it.
double uniform(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// Tokens that would repeat n of `previous` in a row.
std::set<int32_t> banned(const Ids& previous, size_t n) {
  std::set<int32_t> found;
  if (n == 0) return found;
  std::map<Ids, std::set<int32_t>> after;
  for (size_t i = 0; i + n <= previous.size(); ++i)
    after[Ids(&previous[i], &previous[i] + n - 1)].insert(previous[i + n - 1]);
  if (previous.size() >= n) found = after[Ids(previous.end() - static_cast<int>(n - 1), previous.end())];
  return found;
}

struct PlainDraw {
  int32_t token;
  double margin;  // how near a sum came to deciding otherwise
};

// What Sampler::sample means: everything sorted, summed in double.
PlainDraw plain_sample(const SamplingParams& params, Floats scores, const Ids& previous, size_t prompt,
                       uint64_t& state) {
  for (const int32_t id : std::set<int32_t>(previous.begin(), previous.end()))
    scores[id] =
        scores[id] > 0 ? scores[id] / params.repetition_penalty : scores[id] * params.repetition_penalty;
  std::map<int32_t, int> drawn;
  for (size_t i = prompt; i < previous.size(); ++i) ++drawn[previous[i]];
  for (const auto& [id, times] : drawn)
    scores[id] -= params.presence_penalty + params.frequency_penalty * static_cast<float>(times);
  for (const TokenBias& b : params.logit_bias) scores[b.token] += b.bias;
  for (const int32_t id : banned(previous, static_cast<size_t>(params.no_repeat_ngram_size)))
    scores[id] = -kInf;
  Ids order;
  for (size_t i = 0; i < scores.size(); ++i)
    if (!std::isnan(scores[i])) order.push_back(static_cast<int32_t>(i));
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  if (params.temperature == 0) return {order[0], 1};
  if (params.top_k > 0) order.resize(std::min(order.size(), static_cast<size_t>(params.top_k)));
  if (order.size() == 1) {
    if (params.top_k != 1) uniform(state);
    return {order[0], 1};
  }
  std::vector<double> p;
  double total = 0, margin = 1;
  for (const int32_t id : order)
    total +=
        p.emplace_back(std::exp((static_cast<double>(scores[id]) - scores[order[0]]) / params.temperature));
  size_t kept = order.size();
  double sum = 0;
  for (size_t i = 0; params.top_p < 1 && i < kept; ++i) {
    sum += p[i];
    margin = std::min(margin, std::abs(sum / total - params.top_p));
    if (sum >= params.top_p * total) kept = i + 1;
  }
  for (; kept > 1 && p[kept - 1] < params.min_p * p[0]; --kept) {
  }
  total = sum = 0;
  for (size_t i = 0; i < kept; ++i) total += p[i];
  const double draw = uniform(state);
  for (size_t i = 0; i < kept; ++i) {
    sum += p[i];
    margin = std::min(margin, std::abs(sum / total - draw));
    if (sum > draw * total) return {order[i], margin};
  }
  return {order[kept - 1], margin};
}

template <typename T>
T pick(std::mt19937& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

Floats random_logits(std::mt19937& random) {
  Floats logits(pick<size_t>(random, {1, 2, 7, 60, 500, 3000}));
  std::normal_distribution<float> normal(pick(random, {-20.0f, 0.0f, 1000.0f}),
                                         pick(random, {0.0f, 1e-3f, 1.0f, 3.0f, 20.0f}));
  const float grid = pick(random, {0.0f, 0.0f, 0.5f});  // many equal ones
  const unsigned odd = pick(random, {0u, 0u, 5u});      // so many of a hundred are not numbers
  for (float& logit : logits) {
    logit = normal(random);
    if (grid > 0) logit = std::round(logit / grid) * grid;
    if (random() % 100 < odd) logit = pick(random, {kNan, -kInf, -0.0f, -3e37f});
  }
  if (random() % 4 == 0) logits[random() % logits.size()] = pick(random, {30.0f, 1020.0f, 3e37f});
  return logits;
}

std::set<int32_t> draws(SamplingParams params, const Floats& logits, const Ids& previous = {}) {
  std::set<int32_t> tokens;
  Sampler sampler(params);
  for (int i = 0; i < 3000; ++i) tokens.insert(sampler.sample(logits, previous));
  return tokens;
}

// Logits with these probabilities.
Floats logits_of(std::initializer_list<double> probabilities) {
  Floats logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

}  // namespace

TEST_CASE("sampler: the same tokens as by sorting the vocabulary") {
  std::mt19937 random(1);
  int decided = 0, close = 0;
  for (int n = 0; n < 7000; ++n) {
    const Floats logits = random_logits(random);
    if (std::none_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); })) continue;
    SamplingParams params;
    params.temperature = pick(random, {0.0f, 1e-6f, 0.1f, 0.7f, 1.0f, 1.0f, 2.0f, 50.0f, 1e30f});
    params.top_k = pick<int64_t>(random, {0, 0, 0, 1, 2, 40, 400, int64_t{1} << 40});
    params.top_p = pick(random, {1.0f, 1.0f, 0.99f, 0.9f, 0.5f, 0.01f, 1e-30f});
    params.min_p = pick(random, {0.0f, 0.0f, 0.05f, 0.3f, 0.999f});
    params.repetition_penalty = pick(random, {1.0f, 1.0f, 1.1f, 3.0f, 0.5f});
    params.seed = random();
    params.presence_penalty = pick(random, {0.0f, 0.0f, 0.0f, 0.5f, -1.0f});
    params.frequency_penalty = pick(random, {0.0f, 0.0f, 0.0f, 0.25f, 2.0f});
    params.no_repeat_ngram_size = pick<int64_t>(random, {0, 0, 0, 1, 2, 3});
    for (unsigned i = random() % 4; i > 1; --i)
      params.logit_bias.push_back({static_cast<int32_t>(random() % logits.size()), i == 2 ? 5.0f : -100.0f});
    Ids previous;
    for (int i = 0; i < 50; ++i) previous.push_back(static_cast<int32_t>(random() % logits.size()));
    const size_t prompt = random() % 60;
    const std::set<int32_t> never = banned(previous, static_cast<size_t>(params.no_repeat_ngram_size));
    const auto may_be_drawn = [&](size_t id) {
      return std::isfinite(logits[id]) && !never.contains(static_cast<int32_t>(id));
    };
    bool any = false;
    for (size_t id = 0; id < logits.size(); ++id) any = any || may_be_drawn(id);
    if (!any) {
      CHECK_THROWS_AS(Sampler(params).sample(logits, previous, {}, prompt), std::invalid_argument);
      continue;
    }
    Sampler sampler(params);
    uint64_t state = params.seed;
    for (int i = 0; i < 3; ++i) {
      const PlainDraw expected = plain_sample(params, logits, previous, prompt, state);
      const int32_t found = sampler.sample(logits, previous, {}, prompt);
      if (expected.margin < 1e-9) {
        ++close;
        continue;
      }
      ++decided;
      if (found != expected.token) {
        CAPTURE(n);
        CAPTURE(params.temperature);
        CAPTURE(params.top_k);
        CAPTURE(params.top_p);
        CAPTURE(params.min_p);
        CHECK(found == expected.token);
      }
    }
  }
  CHECK(decided > 15000);
  CHECK(close < decided / 20);
}

TEST_CASE("sampler: top_p keeps the fewest that reach it, the one that crosses it too") {
  const Floats logits = logits_of({0.1, 0.4, 0.2, 0.3});
  const auto kept = [&](float top_p) { return draws({.temperature = 1, .top_p = top_p}, logits); };
  CHECK(kept(0.39f) == std::set<int32_t>{1});
  CHECK(kept(0.41f) == std::set<int32_t>{1, 3});
  CHECK(kept(0.69f) == std::set<int32_t>{1, 3});
  CHECK(kept(0.71f) == std::set<int32_t>{1, 2, 3});
  CHECK(kept(0.91f) == std::set<int32_t>{0, 1, 2, 3});
  CHECK(kept(1) == std::set<int32_t>{0, 1, 2, 3});
}

TEST_CASE("sampler: top_k first, top_p of what it keeps, then min_p") {
  const Floats logits = logits_of({0.1, 0.4, 0.2, 0.3});
  CHECK(draws({.temperature = 1, .top_k = 2}, logits) == std::set<int32_t>{1, 3});
  CHECK(draws({.temperature = 1, .top_k = 2, .top_p = 0.5f}, logits) == std::set<int32_t>{1});
  CHECK(draws({.temperature = 1, .top_k = 9}, logits).size() == 4);
  CHECK(draws({.temperature = 1, .min_p = 0.49f}, logits) == std::set<int32_t>{1, 2, 3});
  CHECK(draws({.temperature = 1, .min_p = 0.51f}, logits) == std::set<int32_t>{1, 3});
  CHECK(draws({.temperature = 1, .top_p = 0.41f, .min_p = 0.1f}, logits) == std::set<int32_t>{1, 3});
  CHECK(draws({.temperature = 1, .top_p = 0.95f, .min_p = 0.9f}, logits) == std::set<int32_t>{1});
  // The temperature comes before: squared, 0.2 is a quarter of 0.4.
  CHECK(draws({.temperature = 0.5f, .min_p = 0.3f}, logits) == std::set<int32_t>{1, 3});
}

TEST_CASE("sampler: equal logits count in the order of their ids") {
  for (const size_t n : {4, 4000}) {
    const Floats logits(n, 2.5f);
    CHECK(draws({.temperature = 0}, logits) == std::set<int32_t>{0});
    CHECK(draws({.temperature = 1, .top_k = 3}, logits) == std::set<int32_t>{0, 1, 2});
    CHECK(draws({.temperature = 1, .top_p = 1.5f / static_cast<float>(n)}, logits) ==
          std::set<int32_t>{0, 1});
  }
}

TEST_CASE("sampler: the repetition penalty makes negative logits more so") {
  const Floats logits{2, -1, -2, 1};
  const Ids previous{0, 1, 1, 0, -1, 4};  // each counts once; what is no token of these does not count
  SamplingParams params{.temperature = 1, .repetition_penalty = 4};  // 1/2, -4, -2, 1
  CHECK(draws(params, logits, previous) == std::set<int32_t>{0, 1, 2, 3});
  params.top_k = 3;
  CHECK(draws(params, logits, previous) == std::set<int32_t>{0, 2, 3});
  params.top_k = 2;
  CHECK(draws(params, logits, previous) == std::set<int32_t>{0, 3});
  params.temperature = 0;
  CHECK(draws(params, logits, previous) == std::set<int32_t>{3});
  CHECK(draws(params, logits) == std::set<int32_t>{0});
}

TEST_CASE("sampler: presence and frequency count what was drawn, not the prompt") {
  const Floats logits{2, 1.95f, 1.5f, 0};
  const Ids previous{0, 0, 0, 1, 1, 2};
  const auto likeliest = [&](const SamplingParams& params, size_t prompt) {
    return Sampler(params).sample(logits, previous, {}, prompt);
  };
  for (const size_t prompt : {3, 6, 9}) {
    CHECK(likeliest({.presence_penalty = 1}, prompt) == 0);
    CHECK(likeliest({.frequency_penalty = 0.5f}, prompt) == 0);
  }
  CHECK(likeliest({.presence_penalty = 1}, 0) == 0);  // from all the same
  CHECK(likeliest({.frequency_penalty = 0.1f}, 0) == 1);
  CHECK(likeliest({.frequency_penalty = 0.5f}, 0) == 2);
  CHECK(likeliest({.frequency_penalty = 2}, 0) == 3);
  CHECK(likeliest({.presence_penalty = 3}, 0) == 3);
  CHECK(likeliest({.presence_penalty = -1, .frequency_penalty = 0}, 3) == 1);
}

TEST_CASE("sampler: no n tokens in a row come twice") {
  const Floats logits{5, 4, 3, 2, 1};
  const auto next = [&](int64_t n, const Ids& previous) {
    return Sampler({.no_repeat_ngram_size = n}).sample(logits, previous, {}, previous.size());
  };
  CHECK(next(2, {}) == 0);
  CHECK(next(3, {0}) == 0);
  CHECK(next(1, {0, 2, 1}) == 3);
  CHECK(next(2, {3, 0, 3, 1, 3}) == 2);
  CHECK(next(3, {3, 0, 3, 1, 3}) == 0);
  CHECK(next(3, {4, 3, 0, 4, 3}) == 1);
  CHECK(next(2, {0, 0}) == 1);
  CHECK_THROWS_AS(next(1, {0, 1, 2, 3, 4}), std::invalid_argument);
}

TEST_CASE("sampler: a bias is added to the logit") {
  const Floats logits{2, 1, 0};
  CHECK(Sampler({.logit_bias = {{2, 2.5f}}}).sample(logits, {}) == 2);
  CHECK(Sampler({.logit_bias = {{0, -100}, {2, 0.5f}}}).sample(logits, {}) == 1);
  for (const int32_t id : {-1, 3})
    CHECK_THROWS_AS(Sampler({.logit_bias = {{id, 1}}}).sample(logits, {}), std::invalid_argument);
}

TEST_CASE("sampler: what is no number is never drawn") {
  const Floats logits{kNan, -kInf, 0, kNan, 0.5f, -1000};
  CHECK(draws({.temperature = 0}, logits) == std::set<int32_t>{4});
  CHECK(draws({.temperature = 1}, logits) == std::set<int32_t>{2, 4});
  CHECK(draws({.temperature = 1, .top_k = 4, .top_p = 0.99f}, logits) == std::set<int32_t>{2, 4});
  for (const float temperature : {0.0f, 1.0f})
    for (const Floats& damaged : {Floats{}, Floats{kNan, kNan}, Floats{-kInf, kNan}, Floats{0, kInf, 1}})
      CHECK_THROWS_AS(Sampler({.temperature = temperature}).sample(damaged, {}), Error);
}

TEST_CASE("sampler: nothing is left of the call before") {
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0, 3);
  Floats many(5000), few(50);
  for (Floats* logits : {&many, &few})
    for (float& logit : *logits) logit = normal(random);
  Sampler used({.temperature = 1, .top_p = 0.9f, .repetition_penalty = 2, .seed = 1});
  Sampler fresh({.temperature = 1, .top_p = 0.9f, .repetition_penalty = 2, .seed = 1});
  used.sample(many, Ids{1, 2});
  fresh.sample(few, {});
  for (int i = 0; i < 100; ++i) CHECK(used.sample(few, Ids{3}) == fresh.sample(few, Ids{3}));
}

TEST_CASE("sampler: a seed's draws are the same on every machine") {
  Floats logits(2000);
  for (uint32_t i = 0; i < logits.size(); ++i)
    logits[i] = static_cast<float>(i * 2654435761u >> 16) / 8192;  // 0 to 8, without rounding
  Sampler sampler({.temperature = 0.8f, .top_k = 500, .top_p = 0.95f, .min_p = 0.01f, .seed = 7});
  Ids tokens;
  for (int i = 0; i < 8; ++i) tokens.push_back(sampler.sample(logits, {}));
  CHECK(tokens == Ids{652, 377, 58, 728, 1694, 165, 1461, 597});
}

TEST_CASE("sampler: greedy where the likeliest alone can be drawn and no penalty moves it") {
  CHECK(Sampler({}).is_greedy());
  CHECK(Sampler({.temperature = 1, .top_k = 1}).is_greedy());
  CHECK_FALSE(Sampler({.temperature = 1, .top_k = 2}).is_greedy());
  CHECK_FALSE(Sampler({.temperature = 1}).is_greedy());
  CHECK_FALSE(Sampler({.repetition_penalty = 1.1f}).is_greedy());
  CHECK_FALSE(Sampler({.presence_penalty = 0.1f}).is_greedy());
  CHECK_FALSE(Sampler({.frequency_penalty = -0.1f}).is_greedy());
  CHECK_FALSE(Sampler({.no_repeat_ngram_size = 9}).is_greedy());
  CHECK_FALSE(Sampler({.logit_bias = {{0, 1}}}).is_greedy());
}

TEST_CASE("sampler: parameters out of range are refused") {
  for (const SamplingParams& params :
       {SamplingParams{.temperature = -0.1f}, SamplingParams{.temperature = kNan},
        SamplingParams{.temperature = kInf}, SamplingParams{.top_k = -1}, SamplingParams{.top_p = 0},
        SamplingParams{.top_p = 1.01f}, SamplingParams{.top_p = kNan}, SamplingParams{.min_p = -0.1f},
        SamplingParams{.min_p = 1}, SamplingParams{.min_p = kNan}, SamplingParams{.repetition_penalty = 0},
        SamplingParams{.repetition_penalty = kInf}, SamplingParams{.repetition_penalty = kNan},
        SamplingParams{.presence_penalty = kNan}, SamplingParams{.frequency_penalty = kInf},
        SamplingParams{.no_repeat_ngram_size = -1}, SamplingParams{.logit_bias = {{0, kNan}}}})
    CHECK_THROWS_AS(Sampler{params}, std::invalid_argument);
}
