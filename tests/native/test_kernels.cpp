#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/half.h"
#include "kernel_testing.h"

// Matrix kernels of every instruction set that this machine runs, against the generic ones, and those
// against double precision. test_row_kernels.cpp has the others.

namespace qwen2vl::cpu {
namespace {

constexpr float kEpsilon = std::numeric_limits<float>::epsilon();
constexpr int64_t kRowCounts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 63};

const KernelTable& generic_kernels() { return select_kernels("generic"); }

std::vector<const KernelTable*> fast_kernels() {
  const auto all = supported_kernels();
  return {all.begin(), all.end() - 1};
}

/// Its table is that of `base` but for what it speeds up.
bool extends(const KernelTable& set, const KernelTable& base) {
  constexpr std::pair<std::string_view, std::string_view> kExtensions[] = {{"avxvnni", "avx2"},
                                                                           {"avx512_bf16", "avx512"},
                                                                           {"dotprod", "neon"},
                                                                           {"i8mm", "dotprod"},
                                                                           {"i8mm", "neon"}};
  return std::ranges::find(kExtensions, std::pair{set.isa, base.isa}) != std::end(kExtensions);
}

TEST_CASE("kernel sets are listed best first and can be forced by name") {
  const auto tables = supported_kernels();
  REQUIRE(!tables.empty());
  CHECK_EQ(tables.back()->isa, "generic");
  CHECK_EQ(&select_kernels(""), tables.front());
  for (const KernelTable* table : tables) {
    CHECK_EQ(&select_kernels(table->isa), table);
    CHECK_EQ(select_kernels(table->isa).isa, table->isa);
  }
  for (size_t i = 0; i < tables.size(); ++i) {  // no set runs another's kernels under its own name
    for (size_t j = 0; j < i; ++j) {
      CHECK_NE(tables[i]->isa, tables[j]->isa);
      if (extends(*tables[j], *tables[i])) {
        CHECK_FALSE((tables[i]->matmul_q8 == tables[j]->matmul_q8 &&
                     tables[i]->gemm_bf16_pairs == tables[j]->gemm_bf16_pairs));
        continue;
      }
      CHECK_FALSE((tables[i]->matmul_q8 == tables[j]->matmul_q8));
      CHECK_FALSE((tables[i]->quantize_rows == tables[j]->quantize_rows));
      CHECK_FALSE((tables[i]->gemm_f32 == tables[j]->gemm_f32));
      CHECK_FALSE((tables[i]->softmax_step == tables[j]->softmax_step));
    }
  }
  CHECK_THROWS_WITH_AS(select_kernels("avx1024"), doctest::Contains("\"avx1024\""), UnsupportedError);
  CHECK_THROWS_WITH_AS(select_kernels("avx1024"), doctest::Contains("generic"), UnsupportedError);
}

// --- quantize_rows ---

bool same_quantized(const QuantizedBuffer& a, const QuantizedBuffer& b) {
  return std::memcmp(a.rows.values, b.rows.values, a.rows.planes * a.rows.rows * a.rows.cols) == 0 &&
         std::memcmp(a.scales.data(), b.scales.data(), a.scales.size() * 4) == 0 &&
         a.corrections32 == b.corrections32 && a.corrections16 == b.corrections16;
}

TEST_CASE("activations quantize to the nearest of 255 steps, with the sums that kernels need") {
  const int64_t rows = 5, cols = 320, stride = 331;
  const Floats x = random_floats(rows, stride, 11, true);
  QuantizedBuffer q(rows, cols);
  generic_kernels().quantize_rows(x.data(), stride, rows, q.rows, 0);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t b = 0; b < cols / 32; ++b) {
      const float scale = q.scales[m * (cols / 32) + b];
      float maximum = 0.0f;
      int sums[2] = {};
      for (int64_t i = 0; i < 32; ++i) {
        const int64_t k = b * 32 + i;
        maximum = std::max(maximum, std::fabs(x[m * stride + k]));
        sums[i / 16] += q.rows.values[m * cols + k];
        CHECK(std::fabs(x[m * stride + k] - q.value(m, k)) <= scale * (0.5 + 127 * 2 * kEpsilon));
      }
      CHECK_EQ(scale, maximum / 127.0f);
      CHECK_EQ(q.corrections16[m * (cols / 16) + 2 * b], -128 * sums[0]);
      CHECK_EQ(q.corrections16[m * (cols / 16) + 2 * b + 1], -128 * sums[1]);
      CHECK_EQ(q.corrections32[m * (cols / 32) + b], -128 * (sums[0] + sums[1]));
    }
  }
}

TEST_CASE("a second plane holds what the first has rounded off, in 256ths of its steps") {
  const int64_t rows = 5, cols = 320, stride = 331;
  const Floats x = random_floats(rows, stride, 12, true);
  QuantizedBuffer one(rows, cols), two(rows, cols, 2);
  generic_kernels().quantize_rows(x.data(), stride, rows, one.rows, 0);
  generic_kernels().quantize_rows(x.data(), stride, rows, two.rows, 0);
  CHECK_EQ(std::memcmp(one.rows.values, two.rows.values, rows * cols), 0);
  CHECK(one.scales == two.scales);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < cols; ++k) {
      // A rest of half a step is 128 of these: 127 is the next.
      const double step = two.scales[m * (cols / 32) + k / 32] / 256.0;
      CHECK(std::fabs(x[m * stride + k] - two.value(m, k)) <= 1.01 * step);
    }
    for (int64_t b = 0; b < cols / 16; ++b) {
      const int8_t* rest = two.rows.values + (rows + m) * cols + 16 * b;
      CHECK_EQ(two.corrections16[(rows + m) * (cols / 16) + b], -128 * std::accumulate(rest, rest + 16, 0));
    }
    for (int64_t b = 0; b < cols / 32; ++b) {
      const int32_t* halves = two.corrections16.data() + (rows + m) * (cols / 16) + 2 * b;
      CHECK_EQ(two.corrections32[(rows + m) * (cols / 32) + b], halves[0] + halves[1]);
    }
  }
}

TEST_CASE("quantized activations have the same bits on every instruction set") {
  constexpr float kInf = std::numeric_limits<float>::infinity(),
                  kNan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t cols : {32, 96, 288, 1280}) {
    const int64_t rows = 9, stride = cols + 3;
    Floats x = random_floats(rows, stride, static_cast<uint32_t>(cols), true);
    for (int64_t k = 0; k < 32; ++k) {
      x[k] = 0.0f;                                      // row 0: zeros
      x[stride + k] = (k % 7) * 1e-42f;                 // 1: subnormal
      x[2 * stride + k] = k == 5 ? kNan : 1.0f;         // 2
      x[3 * stride + k] = k == 30 ? -kInf : 1.0f;       // 3
      x[4 * stride + k] = k % 2 ? 3.4e38f : -1e-38f;    // 4: near overflow
      x[5 * stride + k] = k == 0 ? 127.0f : k - 15.5f;  // 5: ties
      x[6 * stride + k] = k == 31 ? kInf : kNan;        // 6
    }
    for (const int planes : {1, 2}) {
      QuantizedBuffer expected(rows, cols, planes);
      generic_kernels().quantize_rows(x.data(), stride, rows, expected.rows, 0);
      CHECK_EQ(expected.scales[0], 0.0f);
      CHECK_EQ(expected.scales[cols / 32], 0.0f);
      CHECK(std::isnan(expected.scales[2 * cols / 32]));
      CHECK(std::isnan(expected.scales[3 * cols / 32]));
      CHECK_EQ(int(expected.rows.values[5 * cols + 1]), -14);  // -14.5 to even
      CHECK_EQ(int(expected.rows.values[5 * cols + 2]), -14);  // -13.5 to even
      for (const KernelTable* kernels : fast_kernels()) {
        CAPTURE(kernels->isa);
        QuantizedBuffer actual(rows, cols, planes), in_parts(rows, cols, planes);
        kernels->quantize_rows(x.data(), stride, rows, actual.rows, 0);
        CHECK(same_quantized(actual, expected));
        kernels->quantize_rows(x.data(), stride, 4, in_parts.rows, 0);
        kernels->quantize_rows(x.data() + 4 * stride, stride, 5, in_parts.rows, 4);
        CHECK(same_quantized(in_parts, expected));
      }
    }
  }
}

// --- matmul_q8 ---

struct MatmulCase {
  Store store;
  bool with_bias;
};
constexpr MatmulCase kMatmulCases[] = {{Store::Overwrite, false},
                                       {Store::Overwrite, true},
                                       {Store::Accumulate, false},
                                       {Store::Accumulate, true}};

/// What a matmul is given and what it must give, in double, with the sum of the terms' magnitudes.
struct Expected {
  std::vector<double> value, magnitude;
};

template <typename A, typename B>
Expected multiply(int64_t rows, int64_t n, int64_t depth, const MatmulOutput& out, A a, B b) {
  Expected e{std::vector<double>(rows * n), std::vector<double>(rows * n)};
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t j = 0; j < n; ++j) {
      double& value = e.value[m * n + j];
      double& magnitude = e.magnitude[m * n + j];
      if (out.store == Store::Accumulate) value = Poisoned::kPoison;
      if (out.bias != nullptr) value += out.bias[j];
      magnitude = std::fabs(value);
      for (int64_t k = 0; k < depth; ++k) {
        value += a(m, k) * b(j, k);
        magnitude += std::fabs(a(m, k) * b(j, k));
      }
    }
  }
  return e;
}

Floats gathered(const Poisoned& out, int64_t begin, int64_t rows, int64_t n, int64_t stride) {
  Floats values;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t j = 0; j < n; ++j) values.push_back(out[begin + m * stride + j]);
  }
  return values;
}

bool smaller_magnitude(float a, float b) { return std::fabs(a) < std::fabs(b); }

void check_matmul_q8(DType type, int64_t rows, int64_t n, int64_t cols, int planes, const MatmulCase& c) {
  const TestMatrix w(type, n, cols, static_cast<uint32_t>(n * 31 + cols));
  QuantizedBuffer x(rows, cols, planes);
  generic_kernels().quantize_rows(random_floats(rows, cols, 77, true).data(), cols, rows, x.rows, 0);
  const Floats bias = random_floats(1, n, 5), weights = w.dequantized();
  const int64_t stride = n + 3;
  AlignedBuffer scratch(matmul_scratch_bytes(cols));
  const auto run = [&](const KernelTable& kernels) {
    Poisoned out(rows * stride);
    const MatmulOutput output{out.data(), stride, c.with_bias ? bias.data() : nullptr, c.store};
    kernels.matmul_q8(TestMatrix(w, kernels.layout).panels, x.rows, {0, w.panels.panel_count(), 0, rows},
                      output, scratch.as<std::byte>());
    CHECK(out.untouched_outside(0, rows, n, stride));
    return gathered(out, 0, rows, n, stride);
  };
  const Floats generic = run(generic_kernels());
  // One rounding for each scale's product and each addition, all below the sum of magnitudes.
  const Expected expected = multiply(
      rows, n, cols, {nullptr, 0, c.with_bias ? bias.data() : nullptr, c.store},
      [&](int64_t m, int64_t k) { return x.value(m, k); },
      [&](int64_t j, int64_t k) { return weights[j * cols + k]; });
  // Weights with a minimum are two terms, together below the weight and twice the minimum, which no weight of
  // another block is much smaller than.
  const double roundings = cols / 16.0 * (dtype_traits(type).format.has_minimum ? 2 : 1) + 4;
  const double largest = dtype_traits(type).format.has_minimum
                             ? std::fabs(*std::max_element(weights.begin(), weights.end(), smaller_magnitude))
                             : 0;
  const auto magnitude = [&](int64_t i) {
    double sum = expected.magnitude[i];
    for (int64_t k = 0; k < cols; ++k) sum += 2 * largest * std::fabs(x.value(i / n, k));
    return sum;
  };
  CHECK_EQ(worst_mismatch(rows * n, generic, expected.value,
                          [&](int64_t i) { return roundings * kEpsilon * magnitude(i); }),
           "");
  for (const KernelTable* kernels : fast_kernels()) {
    CAPTURE(kernels->isa);
    CHECK_EQ(worst_mismatch(rows * n, run(*kernels), generic), "");
  }
}

TEST_CASE("quantized matmul: every shape, the same bits on every instruction set") {
  for (const DType type : quantized_dtypes()) {
    int turn = 0;
    for (const int64_t rows : kRowCounts) {
      for (const int64_t cols : {32, 96, 256, 288, 1280}) {
        if (cols % dtype_traits(type).block_elements != 0) continue;
        const int64_t n = std::vector<int64_t>{16, 40, 1, 64, 33, 31, 49}[turn % 7];
        const MatmulCase& c = kMatmulCases[turn++ % 4];
        CAPTURE(dtype_traits(type).name);
        CAPTURE(rows);
        CAPTURE(cols);
        CAPTURE(n);
        for (const int planes : {1, 2}) check_matmul_q8(type, rows, n, cols, planes, c);
      }
    }
  }
}

TEST_CASE("quantized matmul writes its share of rows and panels alone") {
  const int64_t rows = 21, cols = 256, n = 90, stride = 96;
  for (const DType type : quantized_dtypes()) {
    const TestMatrix w(type, n, cols, 4);
    QuantizedBuffer x(rows, cols, 2);
    generic_kernels().quantize_rows(random_floats(rows, cols, 6).data(), cols, rows, x.rows, 0);
    AlignedBuffer scratch(matmul_scratch_bytes(cols));
    for (const KernelTable* kernels : supported_kernels()) {
      CAPTURE(kernels->isa);
      const TestMatrix packed(w, kernels->layout);
      Poisoned whole(rows * stride), part(rows * stride);
      kernels->matmul_q8(packed.panels, x.rows, {0, 6, 0, rows},
                         {whole.data(), stride, nullptr, Store::Overwrite}, scratch.as<std::byte>());
      kernels->matmul_q8(packed.panels, x.rows, {1, 4, 2, 19},
                         {part.data(), stride, nullptr, Store::Overwrite}, scratch.as<std::byte>());
      CHECK(part.untouched_outside(2 * stride + 16, 17, 48, stride));
      CHECK_EQ(worst_mismatch(17 * 48, gathered(part, 2 * stride + 16, 17, 48, stride),
                              gathered(whole, 2 * stride + 16, 17, 48, stride)),
               "");
    }
  }
}

TEST_CASE("extreme weights and activations neither saturate nor misbehave") {
  const int64_t rows = 7, cols = 256, n = 16;
  AlignedBuffer scratch(matmul_scratch_bytes(cols));
  for (const DType type : quantized_dtypes()) {
    // Byte patterns with the largest products, random ones, and (last) infinite and NaN scales.
    for (const int fill : {0x80, 0x7f, 0x00, 0xff, 0x88, -1}) {
      TestMatrix w(type, n, cols, 1);
      std::mt19937 engine(2);
      for (uint8_t& byte : w.blocks) byte = static_cast<uint8_t>(fill < 0 ? engine() : fill);
      if (fill >= 0) {  // a scale of one
        const int64_t block = dtype_traits(type).block_bytes;
        for (size_t i = d_offset(type); i < w.blocks.size(); i += block)
          w.blocks[i] = 0x00, w.blocks[i + 1] = 0x3c;
      }
      w.pack(type, n, cols);
      const int planes = fill == -1 || fill % 2 == 0 ? 2 : 1;
      QuantizedBuffer x(rows, cols, planes);
      for (int64_t i = 0; i < planes * rows * cols; ++i) x.rows.values[i] = i / cols % rows % 2 ? -127 : 127;
      for (float& scale : x.scales) scale = 0.25f;
      for (int64_t i = 0; i < planes * rows * cols / 16; ++i) {
        x.corrections16[i] = i / (cols / 16) % rows % 2 ? 128 * 16 * 127 : -128 * 16 * 127;
      }
      for (int64_t i = 0; i < planes * rows * cols / 32; ++i) {
        x.corrections32[i] = x.corrections16[2 * i] + x.corrections16[2 * i + 1];
      }
      Floats expected(rows * n);
      generic_kernels().matmul_q8(w.panels, x.rows, {0, 1, 0, rows},
                                  {expected.data(), n, nullptr, Store::Overwrite}, scratch.as<std::byte>());
      for (const KernelTable* kernels : fast_kernels()) {
        CAPTURE(kernels->isa);
        CAPTURE(dtype_traits(type).name);
        CAPTURE(fill);
        Floats actual(rows * n);
        kernels->matmul_q8(TestMatrix(w, kernels->layout).panels, x.rows, {0, 1, 0, rows},
                           {actual.data(), n, nullptr, Store::Overwrite}, scratch.as<std::byte>());
        CHECK_EQ(worst_mismatch(rows * n, actual, expected), "");
      }
    }
  }
}

// --- gemm ---

struct GemmShape {
  int64_t rows, n, depth;
};

/// `run(kernels, out)` calls one of the gemm functions; `b(j, k)` are the values it reads.
template <typename Run, typename B>
void check_gemm(const GemmShape& s, const Floats& a, int64_t a_stride, const MatmulCase& c, Run run, B b) {
  const Floats bias = random_floats(1, s.n, 15);
  const int64_t stride = s.n + 5;
  const auto result = [&](const KernelTable& kernels) {
    Poisoned out(s.rows * stride);
    run(kernels, MatmulOutput{out.data(), stride, c.with_bias ? bias.data() : nullptr, c.store});
    CHECK(out.untouched_outside(0, s.rows, s.n, stride));
    return gathered(out, 0, s.rows, s.n, stride);
  };
  const Expected expected = multiply(
      s.rows, s.n, s.depth, {nullptr, 0, c.with_bias ? bias.data() : nullptr, c.store},
      [&](int64_t m, int64_t k) { return static_cast<double>(a[m * a_stride + k]); }, b);
  const Floats* first_fused = nullptr;
  Floats fused;
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    const Floats actual = result(*kernels);
    CHECK_EQ(worst_mismatch(s.rows * s.n, actual, expected.value,
                            [&](int64_t i) { return (s.depth + 3.0) * kEpsilon * expected.magnitude[i]; }),
             "");
    if (kernels->isa == "generic") continue;
    if (first_fused != nullptr) CHECK_EQ(worst_mismatch(s.rows * s.n, actual, *first_fused), "");
    fused = actual;
    first_fused = &fused;
  }
}

TEST_CASE("float matmul over panels of float32, f16 and bf16: every shape") {
  int turn = 0;
  for (const int64_t rows : kRowCounts) {
    for (const int64_t depth : {1, 17, 64, 80, 128}) {
      const int64_t n = std::vector<int64_t>{16, 80, 1, 64, 33, 130, 31, 145, 95}[turn % 9];
      const MatmulCase& c = kMatmulCases[turn++ % 4];
      const GemmShape shape{rows, n, depth};
      const int64_t a_stride = depth + turn % 3, panels = (n + 15) / 16, panel_stride = 16 * depth + 16;
      const Floats a = random_floats(rows, a_stride, 21, true), b = random_floats(panels, panel_stride, 22);
      std::vector<uint16_t> b_f16, b_bf16;
      for (const float value : b) {
        b_f16.push_back(f32_to_f16(value));
        b_bf16.push_back(f32_to_bf16(value));
      }
      CAPTURE(rows);
      CAPTURE(n);
      CAPTURE(depth);
      const auto at = [&](int64_t j, int64_t k) { return j / 16 * panel_stride + k * 16 + j % 16; };
      check_gemm(
          shape, a, a_stride, c,
          [&](const KernelTable& kernels, const MatmulOutput& out) {
            kernels.gemm_f32(a.data(), a_stride, b.data(), panel_stride, rows, n, depth, out);
          },
          [&](int64_t j, int64_t k) { return static_cast<double>(b[at(j, k)]); });
      check_gemm(
          shape, a, a_stride, c,
          [&](const KernelTable& kernels, const MatmulOutput& out) {
            kernels.gemm_f16(a.data(), a_stride, b_f16.data(), panel_stride, rows, n, depth, out);
          },
          [&](int64_t j, int64_t k) { return static_cast<double>(f16_to_f32(b_f16[at(j, k)])); });
      check_gemm(
          shape, a, a_stride, c,
          [&](const KernelTable& kernels, const MatmulOutput& out) {
            kernels.gemm_bf16(a.data(), a_stride, b_bf16.data(), panel_stride, rows, n, depth, out);
          },
          [&](int64_t j, int64_t k) { return static_cast<double>(bf16_to_f32(b_bf16[at(j, k)])); });
    }
  }
}

}  // namespace
}  // namespace qwen2vl::cpu
