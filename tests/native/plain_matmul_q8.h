#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/kernels/kernel_table.h"
#include "cpu/panel_decoder.h"

namespace qwen2vl::cpu {

/// Row m of quantized activations: column k is scale(k) * value(k).
struct PlainRow {
  const QuantizedRows& x;
  int64_t m;

  int64_t value(int64_t k) const {
    const int8_t* at = x.values + m * x.cols + k;
    return x.planes == 2 ? 256 * at[0] + at[x.rows * x.cols] : at[0];
  }
  float scale(int64_t k) const {
    const float block = x.scales[(m * x.cols + k) / kBlock32];
    return x.planes == 2 ? block / 256 : block;
  }
};

/// One element of matmul_q8's product, from its definition: exact integers within a scale, then
/// std::fma by the product of the scales, and one of the part's minimum. Where the parts' scales are
/// multiplied in integers, these are a block's, and a scale is multiplied once in 256 columns.
inline float plain_q8_element(const PanelMatrix& w, const QuantizedRows& x, int64_t m, int64_t n) {
  const PlainRow row{x, m};
  float sum = 0;
  visit_quantized(w.type, [&]<DType T>() {
    constexpr QuantFormat kFormat = traits_of(T).format;
    const PanelDecoder<T> decoder(w, n / kPanelRows);
    const int64_t r = n % kPanelRows;
    if constexpr (kFormat.scales_integers()) {
      for (int64_t group = 0; group < x.cols; group += kBlock256) {
        float products = 0, minima = 0;
        for (int64_t block = group; block < group + kBlock256; block += kBlock32) {
          int64_t dot = 0, minimum = 0;
          for (int64_t k = block; k < block + kBlock32; ++k) {
            dot += decoder.part_scale(k, r) * decoder.quant(k, r) * row.value(k);
            if constexpr (kFormat.has_minimum) minimum -= decoder.part_minimum(k, r) * row.value(k);
          }
          products = std::fma(static_cast<float>(dot), row.scale(block), products);
          minima = std::fma(static_cast<float>(minimum), row.scale(block), minima);
        }
        sum = std::fma(decoder.block_scale(group, r), products, sum);
        if constexpr (kFormat.has_minimum) sum = std::fma(decoder.block_minimum(group, r), minima, sum);
      }
      return;
    }
    for (int64_t begin = 0; begin < x.cols; begin += kFormat.part) {
      int64_t dot = 0, values = 0;
      for (int64_t k = begin; k < begin + kFormat.part; ++k) {
        dot += decoder.quant(k, r) * row.value(k);
        values += row.value(k);
      }
      sum = std::fma(static_cast<float>(dot), decoder.scale(begin, r) * row.scale(begin), sum);
      if (kFormat.has_minimum)
        sum = std::fma(decoder.minimum(begin, r), -(static_cast<float>(values) * row.scale(begin)), sum);
    }
  });
  return sum;
}

}  // namespace qwen2vl::cpu
