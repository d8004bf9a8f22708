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

int32_t sum_of(const int8_t* values, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  return sum;
}

/// What else GroupRule::Scales wants of a group of `n` values.
void add_scales_rule(int8_t* values, int64_t n, int16_t* sums) {
  for (int64_t i = 0; i < kGroupColumns; i += 16) {
    int16_t* of_32 = sums + kGroupColumns / 16 + i / 32;
    sums[i / 16] = static_cast<int16_t>(i < n ? sum_of(values + i, 16) : 0);
    *of_32 = static_cast<int16_t>(i % 32 == 0 ? sums[i / 16] : *of_32 + sums[i / 16]);
  }
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<int8_t>(static_cast<uint8_t>(values[i]) ^ 0x80);
}

void quantize_groups(const float* x, int64_t x_stride, int64_t rows, const GroupedRows& out,
                     int64_t row_begin) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t g = 0; g < out.groups(); ++g) {
      const int64_t at = g * out.rows + row_begin + i, n = out.columns(g);
      int8_t* values = out.values + at * kGroupColumns;
      quantize_group(x + i * x_stride + g * kGroupColumns, n, values, out.scales + at);
      if (out.rule == GroupRule::Scales)
        add_scales_rule(values, n, out.sums + at * kGroupSums);
      else
        out.corrections[at] = -128 * sum_of(values, n);
    }
  }
}

/// Columns of one group of a panel with a common scale per row: x = scale * value + middle_scale * middle.
struct UnpackedGroup {
  int32_t values[kGroupColumns][kPanelRows];
  float scales[kPanelRows];
  bool has_middle = false;
  int32_t middles[kGroupColumns][kPanelRows];
  float middle_scales[kPanelRows];
};

/// The largest magnitude of some values, and what turns them into integers up to `limit`: 0 where they are
/// all 0 or one is not finite.
struct Range {
  float maximum = 0;
  bool finite = true;

  void note(float x) {
    finite = finite && std::isfinite(x);
    maximum = std::max(maximum, std::fabs(x));
  }
  float inverse(float limit) const { return finite && maximum > 0 ? limit / maximum : 0; }
  int32_t integer(float x, float limit) const {
    const float by = inverse(limit);
    return by == 0 ? 0 : static_cast<int32_t>(std::nearbyint(x * by));
  }
  float or_nan(float scale) const { return finite ? scale : std::numeric_limits<float>::quiet_NaN(); }
};

/// GroupRule::Bytes.
template <DType T>
void requantize(const PanelDecoder<T>& decoder, int64_t begin, int64_t columns, UnpackedGroup& out) {
  constexpr QuantFormat kFormat = PanelDecoder<T>::kFormat;
  constexpr int kShift = kFormat.is_signed() ? 0 : 8 - kFormat.bits(), kLargest = (1 << kFormat.bits()) - 1;
  constexpr float kUnit = kFormat.has_minimum ? 1.0f / 127 : 128.0f / 127 / (1 << kShift);
  constexpr float kLimit = kFormat.has_minimum ? 127 * 256 : kGroupMultiplier;
  for (int64_t r = 0; r < kPanelRows; ++r) {
    Range range;
    for (int64_t k = begin; k < begin + columns; k += kFormat.part) {
      const float scale = decoder.scale(k, r), minimum = decoder.minimum(k, r);
      range.note(kFormat.has_minimum ? minimum : scale);
      if (kFormat.has_minimum) range.note(scale * kLargest - minimum);
    }
    out.scales[r] = range.or_nan(range.maximum * kUnit);
    for (int64_t k = 0; k < columns; ++k) {
      const int32_t q = decoder.quant(begin + k, r),
                    scale = range.integer(decoder.scale(begin + k, r), kLimit);
      if constexpr (kFormat.has_minimum)
        out.values[k][r] = (q * scale + (1 << 7) - range.integer(decoder.minimum(begin + k, r), kLimit)) >> 8;
      else
        out.values[k][r] = (q * (1 << kShift) * scale + (1 << 14)) >> 15;
    }
  }
}

/// GroupRule::Scales.
template <DType T>
void scale_parts(const PanelDecoder<T>& decoder, int64_t begin, int64_t columns, UnpackedGroup& out) {
  constexpr QuantFormat kFormat = PanelDecoder<T>::kFormat;
  constexpr int kMiddle = kFormat.has_minimum ? 1 << (kFormat.bits() - 1) : 0;
  constexpr float kLimit = largest_group_scale(kFormat), kMiddleLimit = INT16_MAX;
  out.has_middle = kFormat.has_minimum;
  for (int64_t r = 0; r < kPanelRows; ++r) {
    const auto middle = [&](int64_t k) { return decoder.scale(k, r) * kMiddle - decoder.minimum(k, r); };
    Range scales, middles;
    for (int64_t k = begin; k < begin + columns; k += kFormat.part) {
      scales.note(decoder.scale(k, r));
      middles.note(middle(k));
    }
    out.scales[r] = scales.or_nan(scales.maximum / kLimit);
    out.middle_scales[r] = middles.or_nan(middles.maximum / kMiddleLimit);
    for (int64_t k = 0; k < columns; ++k) {
      out.values[k][r] =
          (decoder.quant(begin + k, r) - kMiddle) * scales.integer(decoder.scale(begin + k, r), kLimit);
      out.middles[k][r] = middles.integer(middle(begin + k), kMiddleLimit);
    }
  }
}

/// A row's group with a panel's.
void add_products(const UnpackedGroup& w, const GroupedRows& x, int64_t group, int64_t row,
                  float (&sums)[kPanelRows]) {
  const int64_t at = group * x.rows + row;
  const int8_t* values = x.values + at * kGroupColumns;
  const int32_t offset = x.rule == GroupRule::Scales ? 128 : 0;
  const auto value = [&](int64_t k) { return (values[k] & (offset ? 0xff : -1)) - offset; };
  const auto dot = [&](const int32_t (&weights)[kGroupColumns][kPanelRows], int64_t r) {
    int32_t sum = 0;
    for (int64_t k = 0; k < x.columns(group); ++k) sum += weights[k][r] * value(k);
    return static_cast<float>(sum);
  };
  for (int64_t r = 0; r < kPanelRows; ++r) {
    sums[r] = std::fma(dot(w.values, r), w.scales[r] * x.scales[at], sums[r]);
    if (w.has_middle) sums[r] = std::fma(dot(w.middles, r), w.middle_scales[r] * x.scales[at], sums[r]);
  }
}

void matmul_groups(const PanelMatrix& w, const GroupedRows& x, const MatmulTask& task,
                   const MatmulOutput& out, std::byte* scratch) {
  auto* sums = reinterpret_cast<float (*)[kPanelRows]>(scratch);  // [rows]
  UnpackedGroup weights;
  const auto unpack = [&](int64_t panel, int64_t group) {
    visit_quantized(w.type, [&]<DType T>() {
      const auto rule = x.rule == GroupRule::Scales ? scale_parts<T> : requantize<T>;
      rule(PanelDecoder<T>(w, panel), group * kGroupColumns, x.columns(group), weights);
    });
  };
  for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
    std::fill_n(sums[0], task.rows() * kPanelRows, 0.0f);
    for (int64_t g = 0; g < x.groups(); ++g) {
      unpack(p, g);
      for (int64_t m = task.row_begin; m < task.row_end; ++m)
        add_products(weights, x, g, m, sums[m - task.row_begin]);
    }
    const int64_t n = p * kPanelRows, lanes = std::min(kPanelRows, w.rows - n);
    for (int64_t m = task.row_begin; m < task.row_end; ++m) {
      float* row = out.data + m * out.stride + n;
      for (int64_t r = 0; r < lanes; ++r) {
        float sum = sums[m - task.row_begin][r];
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
