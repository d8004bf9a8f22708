#include <algorithm>
#include <cmath>

#include "cpu/kernels/generic/decode_block.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::generic {
namespace {

/// A whole panel: values [cols][16] and scales [cols / 16][16] (see DecodedBlock).
struct DecodedPanel {
  int16_t* values;
  float* scales;
};

/// The order of the sums is simd/matmul_q8.h's: exact integers within a scale, then one fused multiply-add.
void dot_row(const DecodedPanel& panel, int64_t part, const int8_t* x, const float* x_scales, int64_t cols,
             float (&sums)[kPanelRows]) {
  std::fill(sums, sums + kPanelRows, 0.0f);
  for (int64_t begin = 0; begin < cols; begin += part) {
    int32_t dots[kPanelRows] = {};
    for (int64_t k = begin; k < begin + part; ++k) {
      const int16_t* values = panel.values + k * kPanelRows;
      for (int64_t r = 0; r < kPanelRows; ++r) dots[r] += values[r] * x[k];
    }
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const float scale = panel.scales[begin / 16 * kPanelRows + r] * x_scales[begin / kBlock32];
      sums[r] = std::fma(static_cast<float>(dots[r]), scale, sums[r]);
    }
  }
}

void matmul_q8(const PanelMatrix& w, int64_t panel_begin, int64_t panel_end, const QuantizedRows& x,
               int64_t row_begin, int64_t row_end, const MatmulOutput& out, std::byte* scratch) {
  const int64_t cols = w.cols, part = w.type == DType::Q6_K ? 16 : kBlock32;
  const PanelParts parts = panel_parts(w.type, cols);
  auto* values = reinterpret_cast<int16_t*>(scratch);
  const DecodedPanel decoded{values, reinterpret_cast<float*>(values + cols * kPanelRows)};
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    for (int64_t b = 0; b < cols / kBlock32; ++b) {
      decode_block(w, parts, w.panel(p), b,
                   {decoded.values + b * kBlock32 * kPanelRows, decoded.scales + b * 2 * kPanelRows});
    }
    const int64_t n = p * kPanelRows, lanes = std::min(kPanelRows, w.rows - n);
    for (int64_t m = row_begin; m < row_end; ++m) {
      float sums[kPanelRows];
      dot_row(decoded, part, x.values + m * cols, x.scales + m * (cols / kBlock32), cols, sums);
      float* row = out.data + m * out.stride + n;
      for (int64_t r = 0; r < lanes; ++r) {
        const float sum = out.bias == nullptr ? sums[r] : sums[r] + out.bias[n + r];
        row[r] = out.store == Store::Accumulate ? row[r] + sum : sum;
      }
    }
  }
}

}  // namespace

void add_matmul_q8(KernelTable& table) { table.matmul_q8 = matmul_q8; }

}  // namespace qwen2vl::cpu::generic
