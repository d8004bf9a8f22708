#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels/generic/decode_block.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::generic {
namespace {

/// As quantize_rows' blocks (quantize_rows.cpp), but `n` columns long.
void quantize_group(const float* x, int64_t n, int8_t* values, float* scale) {
  float maximum = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i]);
    maximum = std::max(maximum, std::fabs(x[i]));
  }
  const bool zeros = !finite || maximum < 1e-30f;
  const float inverse = zeros ? 0.0f : 127.0f / maximum;
  *scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zeros ? 0.0f : maximum / 127.0f;
  for (int64_t i = 0; i < n; ++i)
    values[i] = zeros ? int8_t{0} : static_cast<int8_t>(std::nearbyint(x[i] * inverse));
}

int32_t correction(const int8_t* values, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  return -128 * sum;
}

void quantize_groups(const float* x, int64_t x_stride, int64_t rows, const GroupedRows& out,
                     int64_t row_begin) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t g = 0; g < out.groups(); ++g) {
      const int64_t at = g * out.rows + row_begin + i, n = out.columns(g);
      int8_t* values = out.values + at * kGroupColumns;
      quantize_group(x + i * x_stride + g * kGroupColumns, n, values, out.scales + at);
      out.corrections[at] = correction(values, n);
    }
  }
}

/// Columns of one group of a panel with a common scale per row.
struct RequantizedGroup {
  int32_t values[kGroupColumns][kPanelRows];
  float scales[kPanelRows];
};

/// The rules stand at KernelTable::matmul_groups.
void requantize(const PanelMatrix& w, int64_t panel, int64_t group, int64_t columns, RequantizedGroup& out) {
  constexpr int64_t kMaxParts = kGroupColumns / 16;
  int16_t values[kGroupColumns * kPanelRows];
  float scales[kMaxParts * kPanelRows];
  const PanelParts parts = panel_parts(w.type, w.cols);
  for (int64_t b = 0; b < columns / kBlock32; ++b)
    decode_block(w, parts, w.panel(panel), group * kGroupBlocks + b,
                 {values + b * kBlock32 * kPanelRows, scales + b * 2 * kPanelRows});
  const int shift = w.type == DType::Q8_0 ? 0 : w.type == DType::Q4_0 ? 4 : 2;
  for (int64_t r = 0; r < kPanelRows; ++r) {
    float maximum = 0;
    bool finite = true;
    for (int64_t p = 0; p < columns / 16; ++p) {
      finite = finite && std::isfinite(scales[p * kPanelRows + r]);
      maximum = std::max(maximum, std::fabs(scales[p * kPanelRows + r]));
    }
    const bool zeros = !finite || maximum == 0;
    const float inverse = zeros ? 0 : kGroupMultiplier / maximum;
    const float unit = 128.0f / 127 / static_cast<float>(1 << shift);
    out.scales[r] = finite ? maximum * unit : std::numeric_limits<float>::quiet_NaN();
    for (int64_t k = 0; k < columns; ++k) {
      const float scale = scales[k / 16 * kPanelRows + r];
      const int32_t multiplier = zeros ? 0 : static_cast<int32_t>(std::nearbyint(scale * inverse));
      const int32_t value = values[k * kPanelRows + r] * (1 << shift);
      out.values[k][r] = (value * multiplier + (1 << 14)) >> 15;
    }
  }
}

void matmul_groups(const PanelMatrix& w, int64_t panel_begin, int64_t panel_end, const GroupedRows& x,
                   int64_t row_begin, int64_t row_end, const MatmulOutput& out, std::byte* scratch) {
  auto* sums = reinterpret_cast<float*>(scratch);  // [rows][16]
  RequantizedGroup weights;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    std::fill_n(sums, (row_end - row_begin) * kPanelRows, 0.0f);
    for (int64_t g = 0; g < x.groups(); ++g) {
      requantize(w, p, g, x.columns(g), weights);
      for (int64_t m = row_begin; m < row_end; ++m) {
        const int8_t* values = x.values + (g * x.rows + m) * kGroupColumns;
        const float x_scale = x.scales[g * x.rows + m];
        for (int64_t r = 0; r < kPanelRows; ++r) {
          int32_t dot = 0;
          for (int64_t k = 0; k < x.columns(g); ++k) dot += weights.values[k][r] * values[k];
          float& sum = sums[(m - row_begin) * kPanelRows + r];
          sum = std::fma(static_cast<float>(dot), weights.scales[r] * x_scale, sum);
        }
      }
    }
    const int64_t n = p * kPanelRows, lanes = std::min(kPanelRows, w.rows - n);
    for (int64_t m = row_begin; m < row_end; ++m) {
      float* row = out.data + m * out.stride + n;
      for (int64_t r = 0; r < lanes; ++r) {
        float sum = sums[(m - row_begin) * kPanelRows + r];
        if (out.bias != nullptr) sum += out.bias[n + r];
        row[r] = out.store == Store::Accumulate ? row[r] + sum : sum;
      }
    }
  }
}

}  // namespace

void add_grouped_matmul(KernelTable& table) {
  table.quantize_groups = quantize_groups;
  table.matmul_groups = matmul_groups;
}

}  // namespace qwen2vl::cpu::generic
