#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>

#include "cpu/kernels/generic/fused_add.h"
#include "kernel_testing.h"
#include "plain_matmul_q8.h"

// The generic products are written for compilers to vectorize; here they meet their definitions.

using namespace qwen2vl;
using namespace qwen2vl::cpu;

namespace {

using Lanes = float[kPanelRows];

/// One product in every lane, each with another neighbour, against std::fma.
void check_fused(float a, float b, float c) {
  Lanes x, y, sums;
  for (int64_t r = 0; r < kPanelRows; ++r) x[r] = a, y[r] = b, sums[r] = c + static_cast<float>(r) * 0.25f;
  sums[0] = c;
  float expected[kPanelRows];
  for (int64_t r = 0; r < kPanelRows; ++r) expected[r] = std::fma(x[r], y[r], sums[r]);
  generic::fused_add(x, y, sums);
  CHECK_EQ(worst_mismatch(kPanelRows, sums, expected), "");
  for (int64_t r = 0; r < kPanelRows; ++r) {
    if (std::isnan(expected[r])) continue;
    CHECK(std::bit_cast<uint32_t>(sums[r]) == std::bit_cast<uint32_t>(expected[r]));
  }
}

}  // namespace

TEST_CASE("a multiply-add in double is a fused one: any bits") {
  std::mt19937 engine(1);
  for (int i = 0; i < 200'000; ++i) {
    const auto any = [&] { return std::bit_cast<float>(static_cast<uint32_t>(engine())); };
    const float a = any(), b = any(), c = i % 2 == 0 ? any() : a * b * 0.75f;
    check_fused(a, b, c);
  }
}

TEST_CASE("a multiply-add in double is a fused one: where rounding twice is not rounding once") {
  // 2^-24 (1 - 2^-46) added to 1 + 2^-23 ends just below halfway, which a double cannot tell from halfway.
  const float a = 1.0f + 0x1p-23f, b = (1.0f - 0x1p-23f) * 0x1p-24f;
  const float twice = static_cast<float>(static_cast<double>(a) * b + a);
  CHECK(twice == 1.0f + 0x1p-22f);
  CHECK(std::fma(a, b, a) == a);
  for (const float sign : {1.0f, -1.0f})
    for (int exponent = -149; exponent <= 120; ++exponent) {
      check_fused(std::ldexp(sign * a, exponent), b, std::ldexp(sign * a, exponent));
      check_fused(std::ldexp(sign * a, exponent), -b, std::ldexp(sign * a, exponent));
    }
}

TEST_CASE("a multiply-add in double is a fused one: the ends of the range") {
  const float values[] = {0.0f,       -0.0f,     0x1p-149f, -0x1p-149f, 0x1.8p-127f, 0x1p-126f,
                          -0x1p-126f, 0x1p-75f,  -0x1p-74f, 1.0f,       -1.0f,       0x1.fffffep127f,
                          0x1p127f,   -0x1p100f, INFINITY,  -INFINITY,  NAN};
  for (const float a : values)
    for (const float b : values)
      for (const float c : values) check_fused(a, b, c);
}

TEST_CASE("generic matmul_q8 is its definition, whatever the layout") {
  const int64_t rows = 3, n = 21;
  for (const DType type : quantized_dtypes())
    for (const int64_t run : {4, 8, 16})
      for (const int64_t cols : {256, 1536})
        for (const int planes : {1, 2}) {
          CAPTURE(dtype_traits(type).name);
          CAPTURE(run);
          CAPTURE(cols);
          CAPTURE(planes);
          const TestMatrix w(type, n, cols, 9, {run});
          QuantizedBuffer x(rows, cols, planes);
          const KernelTable& generic = select_kernels("generic");
          generic.quantize_rows(random_floats(rows, cols, 8, true).data(), cols, rows, x.rows, 0);
          Floats found(rows * n), expected;
          AlignedBuffer scratch(matmul_scratch_bytes(cols));
          generic.matmul_q8(w.panels, x.rows, {0, w.panels.panel_count(), 0, rows},
                            {found.data(), n, nullptr, Store::Overwrite}, scratch.as<std::byte>());
          for (int64_t i = 0; i < rows * n; ++i)
            expected.push_back(plain_q8_element(w.panels, x.rows, i / n, i % n));
          CHECK_EQ(worst_mismatch(rows * n, found, expected), "");
        }
}
