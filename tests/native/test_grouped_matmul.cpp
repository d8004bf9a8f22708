// Quantized matmul of many rows: a scale per group of columns (KernelTable::matmul_groups).

#include <doctest/doctest.h>

#include "kernel_testing.h"

namespace qwen2vl::cpu {
namespace {

struct GroupedBuffer {
  AlignedBuffer values;
  Floats scales;
  std::vector<int32_t> corrections;
  std::vector<int16_t> sums;
  GroupedRows rows;

  GroupedBuffer(GroupRule rule, int64_t n, int64_t cols) {
    rows.rule = rule;
    rows.rows = n;
    rows.cols = cols;
    values = AlignedBuffer(rows.groups() * n * kGroupColumns);
    std::memset(values.data(), 0, values.size());
    scales.resize(rows.groups() * n);
    corrections.resize(rows.groups() * n);
    rows.values = values.as<int8_t>();
    rows.scales = scales.data();
    rows.corrections = corrections.data();
    sums.resize(rows.groups() * n * kGroupSums);
    rows.sums = sums.data();
  }

  /// Of row m's column k.
  int value(int64_t m, int64_t k) const {
    const int8_t byte = rows.values[(k / kGroupColumns * rows.rows + m) * kGroupColumns + k % kGroupColumns];
    return rows.rule == GroupRule::Scales ? static_cast<uint8_t>(byte) - 128 : byte;
  }
};

bool same(const GroupedBuffer& a, const GroupedBuffer& b) {
  return std::memcmp(a.values.data(), b.values.data(), a.values.size()) == 0 &&
         worst_mismatch(static_cast<int64_t>(a.scales.size()), a.scales, b.scales) == "" &&
         a.corrections == b.corrections && a.sums == b.sums;
}

Floats multiply(const KernelTable& kernels, const TestMatrix& w, const GroupedRows& x, Store store,
                const float* bias) {
  const int64_t n = w.panels.rows, stride = n + 3;
  AlignedBuffer scratch(matmul_scratch_bytes(x.cols));
  Poisoned out(x.rows * stride);
  kernels.matmul_groups(TestMatrix(w, kernels.layout).panels, x, {0, w.panels.panel_count(), 0, x.rows},
                        {out.data(), stride, bias, store}, scratch.as<std::byte>());
  CHECK(out.untouched_outside(0, x.rows, n, stride));
  Floats values;
  for (int64_t m = 0; m < x.rows; ++m)
    for (int64_t j = 0; j < n; ++j) values.push_back(out[m * stride + j]);
  return values;
}

constexpr GroupRule kRules[] = {GroupRule::Bytes, GroupRule::Scales};

/// Every set's kernels of a rule; generic has both.
std::vector<const KernelTable*> kernels_of(GroupRule rule) {
  std::vector<const KernelTable*> tables;
  for (const KernelTable* kernels : supported_kernels())
    if (kernels->group_rule == rule || kernels->isa == "generic") tables.push_back(kernels);
  return tables;
}

}  // namespace

TEST_CASE("activations quantize per group of 256 columns, the same bits on every instruction set") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const GroupRule rule : kRules) {
    for (const int64_t cols : {32, 256, 288, 1280}) {
      const int64_t rows = 9, stride = cols + 5;
      Floats x = random_floats(rows, stride, 3, true);
      for (int64_t k = 0; k < cols; ++k) {
        x[1 * stride + k] = 0;
        x[2 * stride + k] = 1e-33f;
      }
      x[3 * stride + cols - 1] = inf;
      x[4 * stride] = nan;
      GroupedBuffer expected(rule, rows, cols);
      select_kernels("generic").quantize_groups(x.data(), stride, rows, expected.rows, 0);
      const int64_t last = expected.rows.groups() - 1;
      CHECK_EQ(expected.scales[1], 0.0f);
      CHECK_EQ(expected.scales[2], 0.0f);
      CHECK(std::isnan(expected.scales[last * rows + 3]));
      CHECK(std::isnan(expected.scales[4]));
      for (int64_t m = 5; m < rows; ++m)
        for (int64_t k = 0; k < cols; ++k) {
          const int64_t at = k / kGroupColumns * rows + m;
          const float back = expected.scales[at] * static_cast<float>(expected.value(m, k));
          CHECK(std::fabs(back - x[m * stride + k]) <= expected.scales[at] * 0.5001f);
        }
      for (const KernelTable* kernels : kernels_of(rule)) {
        CAPTURE(kernels->isa);
        GroupedBuffer actual(rule, rows, cols);
        kernels->quantize_groups(x.data(), stride, 4, actual.rows, 0);
        kernels->quantize_groups(x.data() + 4 * stride, stride, 5, actual.rows, 4);
        CHECK(same(actual, expected));
      }
    }
  }
}

TEST_CASE("grouped matmul: every shape, the same bits on every instruction set") {
  for (const DType type : quantized_dtypes()) {
    int turn = 0;
    for (const int64_t rows : {1, 2, 5, 6, 7, 11, 12, 13, 25, 61}) {
      for (const int64_t cols : {32, 96, 256, 288, 1280}) {
        if (cols % dtype_traits(type).block_elements != 0) continue;
        const int64_t n = std::vector<int64_t>{16, 40, 1, 64, 130, 70, 49}[turn % 7];
        const Store store = turn % 2 ? Store::Overwrite : Store::Accumulate;
        const bool with_bias = turn++ / 2 % 2;
        CAPTURE(dtype_traits(type).name);
        CAPTURE(rows);
        CAPTURE(cols);
        CAPTURE(n);
        const TestMatrix w(type, n, cols, static_cast<uint32_t>(n * 31 + cols));
        const Floats bias = random_floats(1, n, 5);
        const float* biases = with_bias ? bias.data() : nullptr;
        for (const GroupRule rule : kRules) {
          GroupedBuffer x(rule, rows, cols);
          select_kernels("generic").quantize_groups(random_floats(rows, cols, 77).data(), cols, rows, x.rows,
                                                    0);
          const Floats expected = multiply(select_kernels("generic"), w, x.rows, store, biases);
          for (const KernelTable* kernels : kernels_of(rule)) {
            CAPTURE(kernels->isa);
            CHECK_EQ(worst_mismatch(rows * n, multiply(*kernels, w, x.rows, store, biases), expected), "");
          }
        }
      }
    }
  }
}

TEST_CASE("grouped matmul is near what the file's weights give") {
  const int64_t rows = 40, n = 64;
  for (const DType type : quantized_dtypes()) {
    for (const int64_t cols : {256, 1536}) {
      CAPTURE(dtype_traits(type).name);
      CAPTURE(cols);
      const TestMatrix w(type, n, cols, 8);
      const Floats a = random_floats(rows, cols, 9), weights = w.dequantized();
      std::vector<double> expected;
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t j = 0; j < n; ++j) {
          double value = 0;
          for (int64_t k = 0; k < cols; ++k) value += double{a[m * cols + k]} * weights[j * cols + k];
          expected.push_back(value);
        }
      for (const GroupRule rule : kRules) {
        GroupedBuffer x(rule, rows, cols);
        select_kernels("generic").quantize_groups(a.data(), cols, rows, x.rows, 0);
        const Floats actual = multiply(select_kernels("generic"), w, x.rows, Store::Overwrite, nullptr);
        CHECK(nmse(expected, actual) < (rule == GroupRule::Bytes ? 1.2e-4 : 6e-5));
      }
    }
  }
}

TEST_CASE("grouped matmul writes its share of rows and panels alone") {
  const int64_t rows = 21, cols = 512, n = 170, stride = 176;
  const TestMatrix w(DType::Q8_0, n, cols, 4);
  AlignedBuffer scratch(matmul_scratch_bytes(cols));
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    const TestMatrix packed(w, kernels->layout);
    GroupedBuffer x(kernels->group_rule, rows, cols);
    kernels->quantize_groups(random_floats(rows, cols, 6).data(), cols, rows, x.rows, 0);
    Poisoned whole(rows * stride), part(rows * stride);
    kernels->matmul_groups(packed.panels, x.rows, {0, 11, 0, rows},
                           {whole.data(), stride, nullptr, Store::Overwrite}, scratch.as<std::byte>());
    kernels->matmul_groups(packed.panels, x.rows, {1, 7, 2, 19},
                           {part.data(), stride, nullptr, Store::Overwrite}, scratch.as<std::byte>());
    CHECK(part.untouched_outside(2 * stride + 16, 17, 96, stride));
    for (int64_t m = 2; m < 19; ++m)
      for (int64_t j = 16; j < 112; ++j) CHECK_EQ(part[m * stride + j], whole[m * stride + j]);
  }
}

TEST_CASE("grouped matmul of extreme and damaged weights: the same bits, no overflow, NaN where a scale is") {
  const int64_t rows = 7, cols = 256, n = 16;
  for (const DType type : quantized_dtypes()) {
    for (const int fill : {0x80, 0x7f, 0x00, 0xff, 0x88, -1}) {
      TestMatrix w(type, n, cols, 1);
      std::mt19937 engine(2);
      for (uint8_t& byte : w.blocks) byte = static_cast<uint8_t>(fill < 0 ? engine() : fill);
      if (fill >= 0) {  // scales of one and of minus one
        const int64_t block = dtype_traits(type).block_bytes;
        for (size_t i = d_offset(type); i < w.blocks.size(); i += block)
          w.blocks[i] = 0x00, w.blocks[i + 1] = i / block % 2 ? 0x3c : 0xbc;
      }
      w.pack(type, n, cols);
      for (const GroupRule rule : kRules) {
        GroupedBuffer x(rule, rows, cols);
        Floats a;
        for (int64_t m = 0; m < rows; ++m) a.insert(a.end(), cols, m % 2 ? -31.75f : 31.75f);
        select_kernels("generic").quantize_groups(a.data(), cols, rows, x.rows, 0);
        const Floats expected = multiply(select_kernels("generic"), w, x.rows, Store::Overwrite, nullptr);
        if (fill == 0x80 && type == DType::Q8_0) CHECK_EQ(expected[0], 0.0f);  // as many of either sign
        for (const KernelTable* kernels : kernels_of(rule)) {
          CAPTURE(kernels->isa);
          CAPTURE(dtype_traits(type).name);
          CAPTURE(fill);
          CHECK_EQ(
              worst_mismatch(rows * n, multiply(*kernels, w, x.rows, Store::Overwrite, nullptr), expected),
              "");
        }
      }
    }
  }
}

}  // namespace qwen2vl::cpu
