#include <cstring>

#include "base/half.h"
#include "quant/formats.h"
#include "quant/open_block.h"
#include "quant/quantize.h"

namespace qwen2vl {
namespace {

template <DType T>
void dequantize_blocks(const uint8_t* row, int64_t cols, float* out) {
  constexpr DTypeTraits kTraits = traits_of(T);
  constexpr QuantFormat kFormat = kTraits.format;
  OpenBlock block;
  for (int64_t begin = 0; begin < cols; begin += kTraits.block_elements, row += kTraits.block_bytes) {
    open_block_at<T>(row, block);
    const float d = f16_to_f32(block.d), m = kFormat.has_minimum ? f16_to_f32(block.m) : 0.0f;
    for (int64_t i = 0; i < kTraits.block_elements; ++i) {
      const int64_t part = i / kFormat.part;
      const float scale = kFormat.scale_bits == 8 ? d * static_cast<float>(block.scales[part]) : d;
      float x = scale * static_cast<float>(kFormat.value(block.q[i]));
      if constexpr (kFormat.has_minimum)
        x -= kFormat.scale_bits == 8 ? m * static_cast<float>(block.minima[part]) : m;
      out[begin + i] = x;
    }
  }
}

void convert(float (*widen)(uint16_t), const uint8_t* row, int64_t cols, float* out) {
  for (int64_t i = 0; i < cols; ++i) {
    uint16_t half;
    std::memcpy(&half, row + i * 2, sizeof half);
    out[i] = widen(half);
  }
}

}  // namespace

void dequantize_row(DType type, const uint8_t* row, int64_t cols, float* out) {
  const int64_t bytes = row_bytes(type, cols);
  visit_dtype(type, [&]<DType T>() {
    if constexpr (T == DType::F32)
      std::memcpy(out, row, static_cast<size_t>(bytes));
    else if constexpr (T == DType::F16)
      convert(f16_to_f32, row, cols, out);
    else if constexpr (T == DType::BF16)
      convert(bf16_to_f32, row, cols, out);
    else
      dequantize_blocks<T>(row, cols, out);
  });
}

}  // namespace qwen2vl
