#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "engine/distribution.h"

using namespace qwen2vl;

TEST_CASE("distribution: probabilities have a relative error below 2e-10, down to 2^-52 of the likeliest") {
  Distribution distribution;
  double worst = 0;
  for (const float temperature : {0.3f, 1.0f, 7.0f})
    for (float depth = 0; depth < 36.03f; depth += 0.00131f) {
      const std::vector<float> scores{1.5f -
                                      depth * temperature};  // without the likeliest, to see the others
      distribution.assign(scores, 1.5f, temperature);
      const double expected = std::exp((static_cast<double>(scores[0]) - 1.5) / temperature);
      worst = std::max(worst, std::abs(distribution.all().mass / expected - 1));
      REQUIRE(distribution.all().count == 1);
    }
  CHECK(worst < 2e-10);
}

TEST_CASE("distribution: what is further down, and NaN, is in no prefix") {
  constexpr float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> scores{std::nanf(""), -36.1f, -inf, 0, -1, -1e30f};
  Distribution distribution;
  distribution.assign(scores, 0, 1);
  for (const Prefix& prefix : {distribution.all(), distribution.first(4), distribution.at_least(1e-300)}) {
    CHECK(prefix.count == 2);
    CHECK(prefix.mass == doctest::Approx(1 + std::exp(-1)));
  }
}

TEST_CASE("distribution: prefixes end where they say") {
  const std::vector<float> scores{0, std::log(0.5f), 0, std::log(0.25f)};
  Distribution distribution;
  distribution.assign(scores, 0, 1);
  const auto is = [](const Prefix& prefix, int64_t count, double mass, int32_t last) {
    CHECK(prefix.count == count);
    CHECK(prefix.mass == doctest::Approx(mass));
    CHECK(prefix.last == last);
  };
  is(distribution.all(), 4, 2.75, -1);
  is(distribution.first(1), 1, 1, 0);
  is(distribution.first(2), 2, 2, 2);
  is(distribution.first(3), 3, 2.5, 1);
  is(distribution.reaching(1), 1, 1, 0);
  is(distribution.reaching(1.01), 2, 2, 2);
  is(distribution.exceeding(0), 1, 1, 0);
  is(distribution.exceeding(1), 2, 2, 2);
  is(distribution.exceeding(2.6), 4, 2.75, 3);
  is(distribution.at_least(1), 2, 2, -1);
  is(distribution.at_least(0.51), 2, 2, -1);
  is(distribution.at_least(0.49), 3, 2.5, -1);
  is(distribution.at_least(0.24), 4, 2.75, -1);
}
