#include <doctest/doctest.h>

#include <algorithm>
#include <limits>

#include "base/half.h"
#include "kernel_testing.h"

// Row kernels of every instruction set that this machine runs, against double precision.

namespace qwen2vl::cpu {
namespace {

constexpr float kEpsilon = std::numeric_limits<float>::epsilon();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kLengths[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 80, 100, 1280, 1537};

template <typename Body>
void for_each_length(Body body) {
  for (const KernelTable* kernels : supported_kernels()) {
    for (const int64_t n : kLengths) {
      CAPTURE(kernels->isa);
      CAPTURE(n);
      body(*kernels, n);
    }
  }
}

/// A poisoned area that begins with `x`.
Poisoned poisoned_copy(const Floats& x) {
  Poisoned out(static_cast<int64_t>(x.size()));
  std::copy(x.begin(), x.end(), out.data());
  return out;
}

std::vector<double> map(const Floats& x, double (*f)(double)) {
  std::vector<double> y;
  for (const float value : x) y.push_back(f(value));
  return y;
}

TEST_CASE("rms_norm and layer_norm") {
  for_each_length([](const KernelTable& kernels, int64_t n) {
    Floats x = random_floats(1, n, 31, true);
    const Floats weight = random_floats(1, n, 32), bias = random_floats(1, n, 33);
    for (float& value : x) value += 3.0f;
    double mean = 0.0, square = 0.0, variance = 0.0;
    for (const float value : x) mean += value / static_cast<double>(n), square += value * double(value) / n;
    for (const float value : x) variance += (value - mean) * (value - mean) / n;
    std::vector<double> rms(n), layer(n);
    for (int64_t i = 0; i < n; ++i) {
      rms[i] = x[i] / std::sqrt(square + 1e-6) * weight[i];
      layer[i] = (x[i] - mean) / std::sqrt(variance + 1e-6) * weight[i] + bias[i];
    }
    // A sum of n terms in any order: n / 2 units; the mean's error is taken relative to the norm.
    const double units = (n / 2.0 + 6) * kEpsilon;
    Poisoned out(n), in_place = poisoned_copy(x);
    kernels.rms_norm(x.data(), weight.data(), 1e-6f, n, out.data());
    kernels.rms_norm(in_place.data(), weight.data(), 1e-6f, n, in_place.data());
    CHECK(out.untouched_outside(0, 1, n, n));
    CHECK_EQ(worst_mismatch(n, out, rms, [&](int64_t i) { return units * std::fabs(rms[i]); }), "");
    CHECK_EQ(worst_mismatch(n, in_place, out), "");

    const double spread = std::sqrt(square / (variance + 1e-6));
    Poisoned out2(n), in_place2 = poisoned_copy(x);
    kernels.layer_norm(x.data(), weight.data(), bias.data(), 1e-6f, n, out2.data());
    kernels.layer_norm(in_place2.data(), weight.data(), bias.data(), 1e-6f, n, in_place2.data());
    CHECK(out2.untouched_outside(0, 1, n, n));
    CHECK_EQ(worst_mismatch(n, out2, layer,
                            [&](int64_t i) {
                              return units * (spread * std::fabs(weight[i]) + std::fabs(layer[i]) +
                                              std::fabs(bias[i]));
                            }),
             "");
    CHECK_EQ(worst_mismatch(n, in_place2, out2), "");
  });
}

TEST_CASE("activation functions") {
  for_each_length([](const KernelTable& kernels, int64_t n) {
    const Floats x = random_floats(1, n, 41, true), up = random_floats(1, n, 42);
    // The argument of exp is off by half a unit and passes that on times itself.
    const auto tolerance = [&](const std::vector<double>& y, double slope) {
      return [&y, &x, slope](int64_t i) {
        return kEpsilon * ((6 + slope * std::fabs(x[i])) * std::fabs(y[i])) + 1e-37;
      };
    };
    std::vector<double> silu(n);
    for (int64_t i = 0; i < n; ++i) silu[i] = x[i] / (1.0 + std::exp(-static_cast<double>(x[i]))) * up[i];
    Poisoned gate = poisoned_copy(x);
    kernels.silu_mul(gate.data(), up.data(), n);
    CHECK(gate.untouched_outside(0, 1, n, n));
    CHECK_EQ(worst_mismatch(n, gate, silu, tolerance(silu, 1.0)), "");

    const auto quick = map(x, [](double v) { return v / (1.0 + std::exp(-double{1.702f} * v)); });
    Poisoned out = poisoned_copy(x);
    kernels.quick_gelu(out.data(), n);
    CHECK(out.untouched_outside(0, 1, n, n));
    CHECK_EQ(worst_mismatch(n, out, quick, tolerance(quick, 1.702)), "");

    const auto gelu = map(x, [](double v) { return 0.5 * v * (1.0 + std::erf(v / std::sqrt(2.0))); });
    out = poisoned_copy(x);
    kernels.gelu(out.data(), n);
    CHECK(out.untouched_outside(0, 1, n, n));
    CHECK_EQ(worst_mismatch(n, out, gelu, [&](int64_t i) { return 4 * kEpsilon * std::fabs(x[i]); }), "");
  });
}

TEST_CASE("activation functions at the ends of the range") {
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    Floats x = {-1e30f, -200.0f, 0.0f, 200.0f, 1e30f, kInf, kNan}, up(7, 1.0f), silu = x;
    kernels->quick_gelu(x.data(), 7);
    kernels->silu_mul(silu.data(), up.data(), 7);
    CHECK_EQ(worst_mismatch(7, x, Floats{0.0f, 0.0f, 0.0f, 200.0f, 1e30f, kInf, kNan}), "");
    CHECK_EQ(worst_mismatch(7, silu, Floats{0.0f, 0.0f, 0.0f, 200.0f, 1e30f, kInf, kNan}), "");
  }
}

TEST_CASE("rope, scale_row and add_row round once per operation: the same bits everywhere") {
  for_each_length([](const KernelTable& kernels, int64_t n) {
    const Floats x = random_floats(1, 2 * n, 51), angle = random_floats(1, n, 52),
                 y = random_floats(1, n, 53);
    Floats cosine, sine, turned(2 * n), scaled(n), added(n);
    for (int64_t i = 0; i < n; ++i) {
      cosine.push_back(std::cos(angle[i]));
      sine.push_back(std::sin(angle[i]));
      turned[i] = x[i] * cosine[i] - x[i + n] * sine[i];
      turned[i + n] = x[i + n] * cosine[i] + x[i] * sine[i];
      scaled[i] = y[i] * 0.3f;
      added[i] = y[i] + x[i];
    }
    Poisoned out = poisoned_copy(x);
    kernels.rope(out.data(), cosine.data(), sine.data(), n);
    CHECK(out.untouched_outside(0, 1, 2 * n, 2 * n));
    CHECK_EQ(worst_mismatch(2 * n, out, turned), "");
    out = poisoned_copy(y);
    kernels.scale_row(out.data(), 0.3f, n);
    CHECK(out.untouched_outside(0, 1, n, n));
    CHECK_EQ(worst_mismatch(n, out, scaled), "");
    out = poisoned_copy(y);
    kernels.add_row(out.data(), x.data(), n);
    CHECK(out.untouched_outside(0, 1, n, n));
    CHECK_EQ(worst_mismatch(n, out, added), "");
  });
}

TEST_CASE("exp is within two units in the last place over its whole range") {
  Floats x;
  for (float value = 0.0f; value > -104.5f; value -= 0.000937f) x.push_back(value);
  std::vector<double> expected;
  for (const float value : x) expected.push_back(std::exp(static_cast<double>(value)));
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    Floats y = x;
    float maximum = 0.0f, sum = 0.0f;  // scores are below 0: they become exp(score)
    CHECK_EQ(kernels->softmax_step(y.data(), static_cast<int64_t>(y.size()), 1.0f, &maximum, &sum), 1.0f);
    CHECK_EQ(worst_mismatch(static_cast<int64_t>(y.size()), y, expected,
                            [&](int64_t i) {
                              const auto rounded = static_cast<float>(expected[i]);
                              return 2.0 * (std::nextafter(rounded, kInf) - rounded);
                            }),
             "");
  }
}

TEST_CASE("softmax in steps equals softmax at once") {
  for_each_length([](const KernelTable& kernels, int64_t n) {
    const int64_t steps = 3;
    const float scale = 0.37f;
    Floats x = random_floats(steps, n, 61);
    for (float& value : x) value *= 20.0f;
    for (int64_t i = 0; i < steps * n; i += 5) x[i] = -kInf;  // masked
    x[n / 2] = 1.0f;
    double top = -kInf, total = 0.0;
    std::vector<double> expected(steps * n);
    for (const float value : x) top = std::max(top, static_cast<double>(value) * scale);
    for (int64_t i = 0; i < steps * n; ++i)
      total += expected[i] = std::exp(static_cast<double>(x[i]) * scale - top);

    float maximum = -kInf, sum = 0.0f;
    Floats probabilities;
    for (int64_t s = 0; s < steps; ++s) {
      Poisoned scores = poisoned_copy(Floats(x.begin() + s * n, x.begin() + (s + 1) * n));
      const float rescale = kernels.softmax_step(scores.data(), n, scale, &maximum, &sum);
      CHECK(scores.untouched_outside(0, 1, n, n));
      for (float& p : probabilities) p *= rescale;
      for (int64_t i = 0; i < n; ++i) probabilities.push_back(scores[i]);
    }
    // The scaled score and its difference from the maximum are rounded: an absolute error of exp's argument.
    const auto tolerance = [&](int64_t i) {
      return std::isinf(x[i])
                 ? 0.0
                 : expected[i] * kEpsilon * (8 + 2 * std::fabs(x[i] * scale) + 2 * std::fabs(top)) + 1e-44;
    };
    CHECK_EQ(worst_mismatch(steps * n, probabilities, expected, tolerance), "");
    CHECK(std::fabs(sum - total) <= total * kEpsilon * (n / 2.0 + 16 + 4 * std::fabs(top)));
  });
}

TEST_CASE("softmax of masked scores gives zeros and no NaN") {
  for_each_length([](const KernelTable& kernels, int64_t n) {
    float maximum = -kInf, sum = 0.0f;
    Floats scores(n, -kInf);
    CHECK_EQ(kernels.softmax_step(scores.data(), n, 0.125f, &maximum, &sum), 1.0f);
    CHECK_EQ(worst_mismatch(n, scores, Floats(n, 0.0f)), "");
    CHECK_EQ(maximum, -kInf);
    CHECK_EQ(sum, 0.0f);
    scores.assign(n, 2.0f);
    CHECK_EQ(kernels.softmax_step(scores.data(), n, 0.125f, &maximum, &sum), 0.0f);
    CHECK_EQ(worst_mismatch(n, scores, Floats(n, 1.0f)), "");
    CHECK_EQ(maximum, 0.25f);
    CHECK_EQ(sum, static_cast<float>(n));
    scores.assign(n, -kInf);
    CHECK_EQ(kernels.softmax_step(scores.data(), n, 0.125f, &maximum, &sum), 1.0f);
    CHECK_EQ(worst_mismatch(n, scores, Floats(n, 0.0f)), "");
    CHECK_EQ(sum, static_cast<float>(n));
    scores.assign(n, 1.0f);
    scores[n - 1] = kNan;
    kernels.softmax_step(scores.data(), n, 1.0f, &maximum, &sum);
    CHECK(std::isnan(scores[n - 1]));
    CHECK(std::isnan(sum));
  });
}

TEST_CASE("block_maxima") {
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const int64_t blocks : {1, 2, 5, 40}) {
      const int64_t n = blocks * kBlock32;
      const Floats x = random_floats(1, n, 81, true);
      std::vector<double> expected(blocks, 0.0);
      for (int64_t i = 0; i < n; ++i)
        expected[i / kBlock32] = std::max(expected[i / kBlock32], std::fabs(double{x[i]}));
      Poisoned maxima(blocks);
      const double largest = *std::max_element(expected.begin(), expected.end());
      CHECK_EQ(kernels->block_maxima(x.data(), n, maxima.data()), static_cast<float>(largest));
      CHECK(maxima.untouched_outside(0, 1, blocks, blocks));
      CHECK_EQ(worst_mismatch(blocks, maxima, expected), "");
    }
  }
}

TEST_CASE("sum_capped") {
  for_each_length([](const KernelTable& kernels, int64_t n) {
    const Floats x = random_floats(1, n, 81, true);
    double capped = 0.0;
    for (int64_t c = 0; c < n; ++c) {
      capped += std::min(std::fabs(double{x[c]}), 0.5);
    }
    CHECK(std::fabs(kernels.sum_capped(x.data(), 0.5f, n) - capped) <=
          static_cast<double>(n) * kEpsilon * capped);
  });
}

TEST_CASE("float32 to f16 rounds to nearest even") {
  Floats x = {0.0f,          -0.0f,         1.0f,           65504.0f, 65519.9f,       65520.0f,       -1e30f,
              5.9604645e-8f, 2.9802322e-8f, 2.98023259e-8f, 6.1e-5f,  1.00048828125f, 1.00146484375f, kInf,
              -kInf,         kNan};
  const Floats noise = random_floats(1, 1537 - static_cast<int64_t>(x.size()), 71, true);
  x.insert(x.end(), noise.begin(), noise.end());
  for_each_length([&](const KernelTable& kernels, int64_t n) {
    std::vector<uint16_t> out(n + 64, 0xabcd), expected(n + 64, 0xabcd);
    for (int64_t i = 0; i < n; ++i) expected[i] = f32_to_f16(x[i]);
    kernels.convert_f32_to_f16(x.data(), out.data(), n);
    CHECK(out == expected);
  });
}

}  // namespace
}  // namespace qwen2vl::cpu
