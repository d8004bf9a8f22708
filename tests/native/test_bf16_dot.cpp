#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/half.h"
#include "cpu/kernels/kernel_table.h"

using namespace qwen2vl;
using namespace qwen2vl::cpu;

namespace {

std::vector<uint16_t> random_bf16(std::mt19937& random, size_t n) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> values(n);
  for (uint16_t& v : values) v = f32_to_bf16(normal(random));
  return values;
}

}  // namespace

TEST_CASE("gemm_bf16_pairs agrees with double precision on every instruction set") {
  std::mt19937 random(1);
  for (const KernelTable* table : supported_kernels()) {
    CAPTURE(table->isa);
    for (int64_t rows : {1, 2, 5, 12, 13, 96}) {
      for (int64_t n_cols : {1, 16, 31, 80, 96, 200}) {
        for (int64_t depth : {2, 80, 130}) {
          for (const Store store : {Store::Overwrite, Store::Accumulate}) {
            const int64_t panels = (n_cols + kPanelRows - 1) / kPanelRows, stride = n_cols + 3;
            const auto a = random_bf16(random, rows * depth),
                       b = random_bf16(random, panels * depth * kPanelRows);
            std::vector<float> out(rows * stride, 7.0f);
            table->gemm_bf16_pairs(a.data(), depth, b.data(), depth * kPanelRows, rows, n_cols, depth,
                                   {out.data(), stride, nullptr, store});
            for (int64_t m = 0; m < rows; ++m) {
              for (int64_t n = 0; n < stride; ++n) {
                double expected = n >= n_cols || store == Store::Accumulate ? 7 : 0, magnitude = 7;
                for (int64_t k = 0; k < depth && n < n_cols; ++k) {
                  const size_t at =
                      ((n / kPanelRows * depth / 2 + k / 2) * kPanelRows + n % kPanelRows) * 2 + k % 2;
                  const double product = double{bf16_to_f32(a[m * depth + k])} * bf16_to_f32(b[at]);
                  expected += product;
                  magnitude += std::fabs(product);
                }
                // Products are exact in float32; each of `depth` sums rounds once.
                const double tolerance = static_cast<double>(depth) * magnitude * 0x1p-24;
                if (!(std::fabs(out[m * stride + n] - expected) <= tolerance))
                  FAIL("row ", m, " column ", n, " of ", rows, " x ", n_cols, " x ", depth, ": ",
                       out[m * stride + n], " for ", expected);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("softmax_steps_bf16 streams the softmax of every row") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  constexpr float kScale = 0.3f;
  constexpr int64_t kSteps = 3;
  for (const KernelTable* table : supported_kernels()) {
    CAPTURE(table->isa);
    for (int64_t rows : {1, 6, 16, 17}) {
      for (int64_t n : {1, 2, 15, 16, 17, 31, 32, 33, 100, 512}) {
        CAPTURE(rows);
        CAPTURE(n);
        const int64_t stride = n + 3;
        std::vector<float> maxima(rows, -std::numeric_limits<float>::infinity()), sums(rows), factors(rows);
        std::vector<double> all_maxima(rows, -std::numeric_limits<double>::infinity()), all_sums(rows);
        for (int step = 0; step < kSteps; ++step) {
          std::vector<float> scores(rows * stride);
          for (float& s : scores) s = 20 * normal(random);
          std::vector<uint16_t> out(rows * stride, 0x1234);
          table->softmax_steps_bf16(scores.data(), stride, rows, n, kScale, maxima.data(), sums.data(),
                                    factors.data(), out.data(), stride);
          for (int64_t r = 0; r < rows; ++r) {
            const double before = all_maxima[r];
            for (int64_t i = 0; i < n; ++i)
              all_maxima[r] = std::max(all_maxima[r], double{scores[r * stride + i]} * kScale);
            const double factor = std::exp(before - all_maxima[r]);
            CHECK(factors[r] == doctest::Approx(factor).epsilon(1e-5));
            CHECK(maxima[r] == doctest::Approx(all_maxima[r]).epsilon(1e-6));
            all_sums[r] *= factor;
            for (int64_t i = 0; i < n; ++i) {
              const double e = std::exp(scores[r * stride + i] * double{kScale} - all_maxima[r]);
              all_sums[r] += e;
              // bf16 rounds by 2^-8 at most; before it, 2^-13 and the rounding of an exponent of up to
              // about 60.
              const float value = bf16_to_f32(out[r * stride + i]);
              if (!(std::fabs(value - e) <= e * (0x1p-8 + 0x1p-13 + 1e-5) + 1e-37))
                FAIL("row ", r, ", value ", i, ": ", value, " for ", e);
            }
            CHECK(sums[r] == doctest::Approx(all_sums[r]).epsilon(2e-4));
            for (int64_t i = n; i < stride; ++i) CHECK(out[r * stride + i] == 0x1234);
          }
        }
      }
    }
  }
}

TEST_CASE("convert_f32_to_bf16 rounds as the scalar conversion does") {
  std::mt19937 random(2);
  std::uniform_int_distribution<uint32_t> bits;
  for (const KernelTable* table : supported_kernels()) {
    CAPTURE(table->isa);
    for (int64_t n : {1, 15, 16, 17, 4001}) {
      std::vector<float> x(n);
      for (float& v : x) {
        do {
          const uint32_t word = bits(random);
          std::memcpy(&v, &word, sizeof v);
        } while (!std::isnormal(v));  // the processor takes subnormal numbers for zeros
      }
      std::vector<uint16_t> out(n + 1, 0x1234);
      table->convert_f32_to_bf16(x.data(), out.data(), n);
      for (int64_t i = 0; i < n; ++i) REQUIRE(out[i] == f32_to_bf16(x[i]));
      CHECK(out[n] == 0x1234);
    }
  }
}
