#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/kernels/kernel_table.h"
#include "cpu/panel_decoder.h"

namespace qwen2vl::cpu {

/// One element of matmul_q8's product, from its definition: exact integers within a scale, then
/// std::fma by the product of the scales, and one of the part's minimum.
inline float plain_q8_element(const PanelMatrix& w, const QuantizedRows& x, int64_t m, int64_t n) {
  float sum = 0;
  visit_quantized(w.type, [&]<DType T>() {
    constexpr QuantFormat kFormat = traits_of(T).format;
    const PanelDecoder<T> decoder(w, n / kPanelRows);
    const int64_t r = n % kPanelRows, plane = x.rows * x.cols;
    for (int64_t begin = 0; begin < x.cols; begin += kFormat.part) {
      int64_t dot = 0, values = 0;
      for (int64_t k = begin; k < begin + kFormat.part; ++k) {
        const int8_t* at = x.values + m * x.cols + k;
        const int64_t value = x.planes == 2 ? 256 * at[0] + at[plane] : at[0];
        dot += decoder.quant(k, r) * value;
        values += value;
      }
      const float block = x.scales[(m * x.cols + begin) / kBlock32];
      const float x_scale = x.planes == 2 ? block / 256 : block;
      sum = std::fma(static_cast<float>(dot), decoder.scale(begin, r) * x_scale, sum);
      if (kFormat.has_minimum)
        sum = std::fma(decoder.minimum(begin, r), -(static_cast<float>(values) * x_scale), sum);
    }
  });
  return sum;
}

}  // namespace qwen2vl::cpu
