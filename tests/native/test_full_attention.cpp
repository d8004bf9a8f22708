#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cpu/full_attention.h"

using namespace qwen2vl;
using namespace qwen2vl::cpu;

namespace {

using ValueBits = FullAttention::ValueBits;

constexpr int64_t kHeads = 3;

/// Keys and values have biases of hundreds of times what they vary by, in channels that hardly turn; every
/// 37th channel varies by `large` times the others.
struct Problem {
  int64_t rows, head_dim;
  std::vector<float> qkv;
  Rotation rotation;

  Problem(int64_t n, int64_t dim, float large) : rows(n), head_dim(dim), qkv(n * stride()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> bias(stride());
    for (int64_t i = 0; i < stride(); ++i) bias[i] = (i < stride() / 3 ? 0.5f : 300.0f) * normal(random);
    for (int64_t i = 0; i < static_cast<int64_t>(qkv.size()); ++i)
      qkv[i] = bias[i % stride()] + (i % stride() % 37 == 0 ? large : 1.0f) * normal(random);
    for (int64_t i = 0; i < rows * head_dim / 2; ++i) {
      const auto angle =
          1e-5f * static_cast<float>(i / (head_dim / 2)) / static_cast<float>(1 + i % (head_dim / 2));
      rotation.cos.push_back(std::cos(angle));
      rotation.sin.push_back(std::sin(angle));
    }
  }

  int64_t stride() const { return 3 * kHeads * head_dim; }

  /// [rows][heads][head_dim]
  std::vector<float> result(const KernelTable& kernels, int threads, Precision precision,
                            ValueBits bits) const {
    Context ctx(kernels, threads, precision);
    FullAttention attention(kHeads, head_dim, bits);
    std::vector<float> x = qkv, out;
    for (Pieces work = attention(ctx, x.data(), rows, rotation); work.next();) {
    }
    for (int64_t r = 0; r < rows; ++r)
      out.insert(out.end(), x.begin() + r * stride(), x.begin() + r * stride() + stride() / 3);
    return out;
  }

  /// Energy, of what the results vary by over the rows, and a mean of as many values at least: sharp scores
  /// may give every row the same.
  double error(const std::vector<float>& actual, const std::vector<float>& expected) const {
    double lost = 0, energy = 0;
    const int64_t width = stride() / 3;
    const auto n = static_cast<double>(rows);
    const auto spread = [&](const float* x, int64_t step) {
      double sum = 0, squares = 0;
      for (int64_t r = 0; r < rows; ++r) sum += x[r * step], squares += double{x[r * step]} * x[r * step];
      return squares - sum * sum / n;
    };
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t r = 0; r < rows; ++r) lost += std::pow(actual[r * width + i] - expected[r * width + i], 2);
      energy += spread(expected.data() + i, width) + spread(qkv.data() + 2 * width + i, stride()) / n;
    }
    return lost / energy;
  }
};

}  // namespace

TEST_CASE("integers lose little, of biased and of large channels too, and no bit to threads") {
  const KernelTable& plain = select_kernels("generic");
  for (const KernelTable* table : supported_kernels()) {
    CAPTURE(table->isa);
    for (int64_t rows : {2, 17, 129, 700})
      for (int64_t head_dim : {20, 80})
        for (float large : {1.0f, 30.0f}) {
          CAPTURE(rows);
          CAPTURE(head_dim);
          CAPTURE(large);
          const Problem problem(rows, head_dim, large);
          const auto expected = problem.result(plain, 1, Precision::Exact, ValueBits::Sixteen);
          for (const ValueBits bits : {ValueBits::Sixteen, ValueBits::Eight}) {
            const auto actual = problem.result(*table, 1, Precision::Fast, bits);
            const bool eight = table->has_u8_dot && bits == ValueBits::Eight;
            // Measured: 8.1e-4 and 2.2e-6 at most; without centers 1.6e-3 of 16 bits.
            CHECK(problem.error(actual, expected) < (eight ? 3e-3 : 2e-5));
            CHECK(problem.result(*table, 3, Precision::Fast, bits) == actual);
          }
        }
  }
}

TEST_CASE("what is not finite is not hidden") {
  for (const KernelTable* table : supported_kernels()) {
    if (!table->has_i16_dot) continue;  // in float32 an infinite key may have no weight
    CAPTURE(table->isa);
    for (const float bad : {std::nanf(""), INFINITY})
      for (const int64_t of : {0, 1, 2}) {  // a query, a key, a value
        Problem problem(40, 20, 1.0f);
        problem.qkv[7 * problem.stride() + of * problem.stride() / 3] = bad;
        const auto out = problem.result(*table, 1, Precision::Fast, ValueBits::Eight);
        CHECK(!std::isfinite(out[7 * problem.stride() / 3]));
      }
  }
}
