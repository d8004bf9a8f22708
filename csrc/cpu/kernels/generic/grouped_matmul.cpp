#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels/isa_kernels.h"
#include "cpu/panel_decoder.h"

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
template <DType T>
void requantize(const PanelDecoder<T>& decoder, int64_t group, int64_t columns, RequantizedGroup& out) {
  constexpr QuantFormat kFormat = PanelDecoder<T>::kFormat;
  constexpr int kShift = kFormat.is_signed() ? 0 : 8 - kFormat.bits(), kLargest = (1 << kFormat.bits()) - 1;
  const int64_t begin = group * kGroupColumns;
  for (int64_t r = 0; r < kPanelRows; ++r) {
    float maximum = 0;
    bool finite = true;
    for (int64_t k = begin; k < begin + columns; k += kFormat.part) {
      const float scale = decoder.scale(k, r), minimum = decoder.minimum(k, r);
      const float size = kFormat.has_minimum
                             ? std::max(std::fabs(minimum), std::fabs(scale * kLargest - minimum))
                             : std::fabs(scale);
      finite = finite && std::isfinite(scale) && std::isfinite(minimum);
      maximum = std::max(maximum, size);
    }
    const bool zeros = !finite || maximum == 0;
    constexpr float kUnit = kFormat.has_minimum ? 1.0f / 127 : 128.0f / 127 / (1 << kShift);
    out.scales[r] = finite ? maximum * kUnit : std::numeric_limits<float>::quiet_NaN();
    const float inverse = zeros ? 0 : (kFormat.has_minimum ? 127 * 256 : kGroupMultiplier) / maximum;
    const auto multiplier = [&](float x) {
      return zeros ? 0 : static_cast<int32_t>(std::nearbyint(x * inverse));
    };
    for (int64_t k = 0; k < columns; ++k) {
      const int32_t q = decoder.quant(begin + k, r), scale = multiplier(decoder.scale(begin + k, r));
      if constexpr (kFormat.has_minimum)
        out.values[k][r] = (q * scale + (1 << 7) - multiplier(decoder.minimum(begin + k, r))) >> 8;
      else
        out.values[k][r] = (q * (1 << kShift) * scale + (1 << 14)) >> 15;
    }
  }
}

void matmul_groups(const PanelMatrix& w, const GroupedRows& x, const MatmulTask& task,
                   const MatmulOutput& out, std::byte* scratch) {
  auto* sums = reinterpret_cast<float*>(scratch);  // [rows][16]
  RequantizedGroup weights;
  const auto requantize_group = [&](int64_t panel, int64_t group) {
    visit_quantized(
        w.type, [&]<DType T>() { requantize(PanelDecoder<T>(w, panel), group, x.columns(group), weights); });
  };
  for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
    std::fill_n(sums, task.rows() * kPanelRows, 0.0f);
    for (int64_t g = 0; g < x.groups(); ++g) {
      requantize_group(p, g);
      for (int64_t m = task.row_begin; m < task.row_end; ++m) {
        const int8_t* values = x.values + (g * x.rows + m) * kGroupColumns;
        const float x_scale = x.scales[g * x.rows + m];
        for (int64_t r = 0; r < kPanelRows; ++r) {
          int32_t dot = 0;
          for (int64_t k = 0; k < x.columns(g); ++k) dot += weights.values[k][r] * values[k];
          float& sum = sums[(m - task.row_begin) * kPanelRows + r];
          sum = std::fma(static_cast<float>(dot), weights.scales[r] * x_scale, sum);
        }
      }
    }
    const int64_t n = p * kPanelRows, lanes = std::min(kPanelRows, w.rows - n);
    for (int64_t m = task.row_begin; m < task.row_end; ++m) {
      float* row = out.data + m * out.stride + n;
      for (int64_t r = 0; r < lanes; ++r) {
        float sum = sums[(m - task.row_begin) * kPanelRows + r];
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
