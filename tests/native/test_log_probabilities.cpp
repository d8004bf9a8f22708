#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "base/error.h"
#include "engine/log_probabilities.h"

using namespace qwen2vl;

TEST_CASE("log probabilities: as summed in double, the likeliest as sorted") {
  std::mt19937 random(4);
  for (int n = 0; n < 300; ++n) {
    std::vector<float> logits(1 + random() % 3000);
    std::normal_distribution<float> normal(static_cast<float>(random() % 40),
                                           static_cast<float>(random() % 9));
    for (float& logit : logits) logit = std::round(normal(random) * 4) / 4;  // many equal ones
    if (n % 3 == 0) logits[random() % logits.size()] = -std::numeric_limits<float>::infinity();
    if (n % 3 == 1 && logits.size() > 1) logits[random() % logits.size()] = std::nanf("");
    std::vector<int32_t> order;
    for (size_t i = 0; i < logits.size(); ++i)
      if (!std::isnan(logits[i])) order.push_back(static_cast<int32_t>(i));
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    if (!std::isfinite(logits[order[0]])) continue;
    double sum = 0;
    for (const int32_t id : order) sum += std::exp(double{logits[id]} - logits[order[0]]);
    const double log_sum = logits[order[0]] + std::log(sum);
    const size_t top = random() % 21;
    const int32_t asked = order[random() % order.size()];
    const LogProbabilities found = log_probabilities(logits, asked, top);
    if (std::isfinite(logits[asked]))
      CHECK(std::abs(found.value - (logits[asked] - log_sum)) < 1e-9);
    else
      CHECK(found.value == -std::numeric_limits<double>::infinity());
    REQUIRE(found.top.size() == std::min(top, order.size()));
    for (size_t i = 0; i < found.top.size(); ++i) {
      CHECK(found.top[i].token == order[i]);
      if (order[i] == asked) CHECK(found.top[i].value == found.value);
    }
  }
}

TEST_CASE("log probabilities: of tokens and numbers alone") {
  const std::vector<float> logits{1, 2};
  for (const int32_t id : {-1, 2}) CHECK_THROWS_AS(log_probabilities(logits, id, 1), std::invalid_argument);
  const float nan = std::nanf("");
  CHECK_THROWS_AS(log_probabilities(std::vector<float>{nan, nan}, 0, 1), Error);
}
