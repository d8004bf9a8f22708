#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cpu/kernels/kernel_table.h"

using namespace qwen2vl;
using namespace qwen2vl::cpu;

namespace {

template <typename T>
std::vector<T> random_integers(std::mt19937& random, size_t n, int least, int most) {
  std::uniform_int_distribution<int> number(least, most);
  std::vector<T> values(n);
  for (T& v : values) v = static_cast<T>(number(random));
  return values;
}

/// Against 64-bit sums, bit for bit; `depths` with operands as large as their sums may be.
template <typename A, typename B, typename Gemm>
void check_gemm(Gemm gemm, int least_a, int most_a, int most_b, std::initializer_list<int64_t> depths) {
  constexpr int64_t kRun = 4 / sizeof(A);
  std::mt19937 random(1);
  std::uniform_real_distribution<float> scale(0.001f, 2.0f);
  for (const KernelTable* table : supported_kernels()) {
    CAPTURE(table->isa);
    for (int64_t rows : {1, 2, 5, 6, 7, 12, 13, 100})
      for (int64_t n_cols : {1, 8, 16, 31, 80, 96, 200})
        for (int64_t depth : depths)
          for (const Store store : {Store::Overwrite, Store::Accumulate}) {
            const int64_t panels = (n_cols + kPanelRows - 1) / kPanelRows, stride = n_cols + 3;
            auto a = random_integers<A>(random, rows * depth, least_a, most_a);
            auto b = random_integers<B>(random, panels * depth * kPanelRows, -most_b, most_b);
            for (int64_t k = 0; k < depth; ++k) {  // the largest sum there is
              a[k] = static_cast<A>(most_a);
              b[k / kRun * kPanelRows * kRun + k % kRun] = static_cast<B>(most_b);
            }
            std::vector<float> scales(rows), out(rows * stride, 7.0f);
            for (float& s : scales) s = scale(random);
            (table->*gemm)(a.data(), depth, b.data(), depth * kPanelRows, rows, n_cols, depth, scales.data(),
                           {out.data(), stride, nullptr, store});
            for (int64_t m = 0; m < rows; ++m)
              for (int64_t n = 0; n < stride; ++n) {
                int64_t sum = 0;
                for (int64_t k = 0; k < depth && n < n_cols; ++k)
                  sum += int64_t{a[m * depth + k]} *
                         b[((n / kPanelRows * depth + k) / kRun * kPanelRows + n % kPanelRows) * kRun +
                           k % kRun];
                const auto value = static_cast<float>(sum);
                const float expected = n >= n_cols                  ? 7.0f
                                       : store == Store::Accumulate ? std::fma(value, scales[m], 7.0f)
                                                                    : value * scales[m];
                if (out[m * stride + n] != expected)
                  FAIL("row ", m, " column ", n, " of ", rows, " x ", n_cols, " x ", depth, ": ",
                       out[m * stride + n], " for ", expected);
              }
          }
  }
}

template <typename T, typename Steps>
void check_softmax(Steps steps, int largest) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  constexpr int64_t kRows = 19, kStride = kIntegerKeys + 5, kPieces = kIntegerKeys / kPieceKeys;
  for (const KernelTable* table : supported_kernels()) {
    CAPTURE(table->isa);
    for (int64_t rows : {int64_t{1}, int64_t{8}, int64_t{10}, kRows}) {
      for (int64_t n : {1, 2, 15, 63, 64, 65, 127, 128, 129, 200, 384, 511, 512}) {
        CAPTURE(rows);
        CAPTURE(n);
        std::vector<float> maxima(rows, -std::numeric_limits<float>::infinity()), sums(rows), factors(rows);
        std::vector<double> all_maxima(rows, -std::numeric_limits<double>::infinity()), all_sums(rows);
        for (int step = 0; step < 3; ++step) {
          std::vector<float> scores(kRows * kStride), scales(kPieces * kRows);
          for (float& s : scores) s = 6 * normal(random);
          const std::vector<float> given = scores;
          std::vector<T> out(kRows * kStride, T{77});
          (table->*steps)(scores.data(), kStride, rows, n, maxima.data(), sums.data(), factors.data(),
                          out.data(), kStride, scales.data(), kRows);
          for (int64_t r = 0; r < rows; ++r) {
            const float* row = given.data() + r * kStride;
            const double before = all_maxima[r];
            for (int64_t i = 0; i < n; ++i) all_maxima[r] = std::max(all_maxima[r], double{row[i]});
            CHECK(maxima[r] == static_cast<float>(all_maxima[r]));
            CHECK(factors[r] == doctest::Approx(std::exp2(before - all_maxima[r])).epsilon(1e-5));
            all_sums[r] *= std::exp2(before - all_maxima[r]);
            for (int64_t begin = 0; begin < n; begin += kPieceKeys) {
              const int64_t end = std::min(begin + kPieceKeys, n);
              const double top = *std::max_element(row + begin, row + end);
              const float scale = scales[begin / kPieceKeys * kRows + r];
              CHECK(scale * largest == doctest::Approx(std::exp2(top - all_maxima[r])).epsilon(1e-5));
              for (int64_t i = begin; i < end; ++i) {
                const double exact = largest * std::exp2(row[i] - top);
                const T rounded = out[r * kStride + i];
                // Half of 1, and 2^-13 of it before it was rounded.
                if (!(std::fabs(rounded - exact) <= 0.5 + exact * 0x1p-13))
                  FAIL("row ", r, ", key ", i, ": ", int{rounded}, " for ", exact);
                all_sums[r] += rounded * double{scale};
              }
            }
            CHECK(sums[r] == doctest::Approx(all_sums[r]).epsilon(1e-5));
            const int64_t room = (n + kIntegerRoom - 1) / kIntegerRoom * kIntegerRoom;
            for (int64_t i = n; i < kStride; ++i) CHECK(out[r * kStride + i] == (i < room ? 0 : 77));
          }
          for (int64_t i = rows * kStride; i < kRows * kStride; ++i) REQUIRE(out[i] == 77);
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("integer gemms are exact sums, scaled, on every instruction set") {
  // Probabilities and values of a piece; queries and keys of head_dim 80, as large as fit.
  check_gemm<int16_t, int16_t>(&KernelTable::gemm_i16, 0, kLargest16, kLargest16, {2, 48, kPieceKeys});
  check_gemm<int16_t, int16_t>(&KernelTable::gemm_i16, -5181, 5181, 5181, {80});
  check_gemm<uint8_t, int8_t>(&KernelTable::gemm_u8_i8, 0, 255, 127, {4, 48, kPieceKeys});
}

TEST_CASE("softmax_steps_* stream the softmax of every row, in rounded pieces") {
  check_softmax<uint8_t>(&KernelTable::softmax_steps_u8, 255);
  check_softmax<int16_t>(&KernelTable::softmax_steps_i16, kLargest16);
}

TEST_CASE("quantize_i16 and round_i16 round as the plain ones do") {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const KernelTable& generic = select_kernels("generic");
  for (const KernelTable* table : supported_kernels()) {
    CAPTURE(table->isa);
    for (int64_t n : {4, 8, 20, 32, 64, 68, 80, 128}) {
      CAPTURE(n);
      const int64_t room = (n + kIntegerRoom - 1) / kIntegerRoom * kIntegerRoom;
      std::vector<float> x(n), centers(n), factors(n);
      for (int64_t i = 0; i < n; ++i)
        x[i] = normal(random), centers[i] = normal(random), factors[i] = normal(random);
      std::vector<int16_t> out(room + 1, 77), expected(room + 1, 77);
      const float unit = table->quantize_i16(x.data(), factors.data(), n, 5181, out.data());
      CHECK(unit == generic.quantize_i16(x.data(), factors.data(), n, 5181, expected.data()));
      for (int64_t i = 0; i < n; ++i) {
        CHECK(out[i] == expected[i]);
        CHECK(std::fabs(out[i] * double{unit} - double{x[i]} * factors[i]) <= 0.501 * unit);
      }
      CHECK(out[room] == 77);
      for (float& f : factors) f *= 1000;
      table->round_i16(x.data(), centers.data(), factors.data(), n, out.data());
      generic.round_i16(x.data(), centers.data(), factors.data(), n, expected.data());
      for (int64_t i = 0; i < n; ++i) CHECK(out[i] == expected[i]);
      CHECK(out[room] == 77);

      const std::vector<float> zeros(n);
      CHECK(table->quantize_i16(zeros.data(), factors.data(), n, 5181, out.data()) == 0.0f);
      for (int64_t i = 0; i < n; ++i) CHECK(out[i] == 0);
      for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
        std::vector<float> y = x;
        y[n - 1] = bad;
        CHECK(std::isnan(table->quantize_i16(y.data(), factors.data(), n, 5181, out.data())));
      }
    }
  }
}
