#include <doctest/doctest.h>

#include "kernel_testing.h"

namespace qwen2vl::cpu {
namespace {

int64_t multiple_of(DType type) { return dtype_traits(type).block_elements; }

TEST_CASE("a packed row dequantizes to the same bits as the row of the file") {
  for (const DType type : dtypes()) {
    for (const int64_t cols : {256, 512, 1536}) {
      for (const int64_t rows : {1, 15, 16, 17, 40}) {
        const TestMatrix matrix(type, rows, cols, static_cast<uint32_t>(rows + cols));
        const Floats expected = matrix.dequantized();
        Floats row(cols);
        for (int64_t r = 0; r < rows; ++r) {
          CAPTURE(dtype_traits(type).name);
          CAPTURE(r);
          dequantize_panel_row(matrix.panels, r, row.data());
          CHECK_EQ(worst_mismatch(cols, row, expected.data() + r * cols), "");
        }
      }
    }
  }
}

TEST_CASE("every layout holds the same values, in other places but for those of 3 bits") {
  for (const DType type : quantized_dtypes()) {
    CAPTURE(dtype_traits(type).name);
    const int64_t rows = 20, cols = 512;
    const TestMatrix usual(type, rows, cols, 8);
    const Floats expected = usual.dequantized();
    for (const int64_t run : {8, 16}) {
      CAPTURE(run);
      const TestMatrix matrix(type, rows, cols, 8, PanelLayout{run});
      CHECK(matrix.panels.panel_bytes == usual.panels.panel_bytes);
      const int differ = std::memcmp(matrix.storage.data(), usual.storage.data(), matrix.panels.panel_bytes);
      CHECK((differ == 0) == (dtype_traits(type).format.low_bits == 3));
      Floats row(cols);
      for (int64_t r = 0; r < rows; ++r) {
        dequantize_panel_row(matrix.panels, r, row.data());
        CHECK_EQ(worst_mismatch(cols, row, expected.data() + r * cols), "");
      }
    }
  }
}

TEST_CASE("a run of 8 keeps eight columns of a row side by side, as smmla's operands have them") {
  const TestMatrix matrix(DType::Q8_0, 16, 32, 8, PanelLayout{8});
  const uint8_t* quants = matrix.blocks.data() + 2;  // behind the first row's scale
  const int64_t row = row_bytes(DType::Q8_0, 32);
  for (int64_t k = 0; k < 32; ++k)
    for (int64_t r = 0; r < 16; ++r)
      CHECK_EQ(matrix.storage.data()[k / 8 * 128 + r * 8 + k % 8], quants[r * row + k]);
}

TEST_CASE("rows that fill up the last panel are zero") {
  for (const DType type : dtypes()) {
    const int64_t cols = 2 * multiple_of(type) + (multiple_of(type) == 1 ? 5 : 0);
    const TestMatrix matrix(type, 19, cols, 3);
    Floats row(cols, 1.0f);
    for (int64_t r = 19; r < 32; ++r) {
      CAPTURE(dtype_traits(type).name);
      dequantize_panel_row(matrix.panels, r, row.data());
      CHECK_EQ(worst_mismatch(cols, row, Floats(cols, 0.0f)), "");
    }
  }
}

TEST_CASE("the parts of a panel follow each other and a panel is a multiple of 64 bytes") {
  CHECK_EQ(panel_parts(DType::F32, 7).bytes, 7 * 64);
  CHECK_EQ(panel_parts(DType::F16, 7).bytes, 256);  // 224 rounded up
  const PanelParts q8 = panel_parts(DType::Q8_0, 96);
  CHECK_EQ(q8.scales, 96 * 16);
  CHECK_EQ(q8.bytes, 96 * 16 + 128);  // 3 * 16 f16 scales rounded up
  const PanelParts q4 = panel_parts(DType::Q4_0, 96);
  CHECK_EQ(q4.scales, 96 * 8);
  CHECK_EQ(q4.bytes, 96 * 8 + 128);
  const PanelParts q6 = panel_parts(DType::Q6_K, 512);
  CHECK_EQ(q6.high, 512 * 8);
  CHECK_EQ(q6.scales, 512 * 12);
  CHECK_EQ(q6.block_scales, 512 * 13);
  CHECK_EQ(q6.bytes, 512 * 13 + 64);
}

TEST_CASE("packing writes one panel and not a byte more") {
  for (const DType type : dtypes()) {
    const int64_t cols = 3 * multiple_of(type), bytes = panel_parts(type, cols).bytes;
    const TestMatrix matrix(type, 20, cols, 5);
    for (const int64_t panel : {0, 1}) {
      CAPTURE(dtype_traits(type).name);
      std::vector<uint8_t> out(bytes + 128, 0xa5);
      pack_panel(matrix.panels, matrix.blocks.data(), 20, panel, out.data() + 64);
      for (int i = 0; i < 64; ++i) {
        CHECK_EQ(int(out[i]), 0xa5);
        CHECK_EQ(int(out[64 + bytes + i]), 0xa5);
      }
    }
  }
}

TEST_CASE("a row that blocks do not divide is refused") {
  uint8_t in[4096] = {}, out[4096];
  CHECK_THROWS_AS(pack_panel({DType::Q4_0, 16, 40}, in, 16, 0, out), std::invalid_argument);
}

TEST_CASE("every kernel set unpacks a panel to the values of the file") {
  for (const DType type : dtypes()) {
    const int64_t rows = 20, cols = 1280;
    const TestMatrix matrix(type, rows, cols, 9);
    const Floats expected = matrix.dequantized();
    for (const KernelTable* kernels : supported_kernels()) {
      CAPTURE(kernels->isa);
      CAPTURE(dtype_traits(type).name);
      const TestMatrix packed(matrix, kernels->layout);
      AlignedBuffer scratch(matmul_scratch_bytes(cols));
      for (const int64_t panel : {0, 1}) {
        kernels->unpack_panel(packed.panels, panel, scratch.as<float>());
        Floats interleaved(cols * kPanelRows, 0.0f);
        for (int64_t r = 0; r < std::min(kPanelRows, rows - panel * kPanelRows); ++r) {
          for (int64_t k = 0; k < cols; ++k) {
            interleaved[k * kPanelRows + r] = expected[(panel * kPanelRows + r) * cols + k];
          }
        }
        CHECK_EQ(worst_mismatch(cols * kPanelRows, scratch.as<float>(), interleaved), "");
      }
    }
  }
}

TEST_CASE("every kernel set unpacks single columns to the values of the file") {
  for (const DType type : quantized_dtypes()) {
    const int64_t rows = 20, cols = 512;
    const TestMatrix matrix(type, rows, cols, 10);
    const Floats expected = matrix.dequantized();
    const std::vector<int32_t> columns{0, 3, 15, 16, 30, 31, 100, 255, 256, 290, 511};
    const auto n = static_cast<int64_t>(columns.size());
    for (const KernelTable* kernels : supported_kernels()) {
      CAPTURE(kernels->isa);
      CAPTURE(dtype_traits(type).name);
      const TestMatrix packed(matrix, kernels->layout);
      for (const int64_t panel : {0, 1}) {
        Floats actual(n * kPanelRows), interleaved(n * kPanelRows, 0.0f);
        kernels->unpack_columns(packed.panels, panel, columns.data(), n, actual.data());
        for (int64_t i = 0; i < n * kPanelRows; ++i) {
          const int64_t r = panel * kPanelRows + i % kPanelRows;
          if (r < rows) interleaved[i] = expected[r * cols + columns[i / kPanelRows]];
        }
        CHECK_EQ(worst_mismatch(n * kPanelRows, actual, interleaved), "");
      }
    }
  }
}

}  // namespace
}  // namespace qwen2vl::cpu
