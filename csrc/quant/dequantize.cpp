#include <cstring>

#include "base/half.h"
#include "quant/quantize.h"

namespace qwen2vl {
namespace {

void dequantize_block(const BlockQ4_0& block, float* out) {
  const float d = f16_to_f32(block.d);
  constexpr int64_t kHalf = kBlock32 / 2;
  for (int64_t i = 0; i < kHalf; ++i) {
    out[i] = d * static_cast<float>((block.qs[i] & 15) - 8);
    out[i + kHalf] = d * static_cast<float>((block.qs[i] >> 4) - 8);
  }
}

void dequantize_block(const BlockQ8_0& block, float* out) {
  const float d = f16_to_f32(block.d);
  for (int64_t i = 0; i < kBlock32; ++i) out[i] = d * static_cast<float>(block.qs[i]);
}

void dequantize_block(const BlockQ6_K& block, float* out) {
  const float d = f16_to_f32(block.d);
  for (int i = 0; i < kBlock256; ++i) {
    const int half = i / 128, l = i % 32, quarter = i % 128 / 32;
    const int low = block.ql[64 * half + 32 * (quarter % 2) + l] >> (quarter < 2 ? 0 : 4) & 15;
    const int high = block.qh[32 * half + l] >> (2 * quarter) & 3;
    out[i] = d * static_cast<float>(block.scales[i / 16]) * static_cast<float>((low | high << 4) - 32);
  }
}

template <typename Block, int64_t kElements>
void dequantize_blocks(const uint8_t* row, int64_t cols, float* out) {
  for (int64_t i = 0; i < cols; i += kElements, row += sizeof(Block)) {
    Block block;  // `row` need not be aligned
    std::memcpy(&block, row, sizeof block);
    dequantize_block(block, out + i);
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
  switch (type) {
    case DType::F32:
      std::memcpy(out, row, static_cast<size_t>(bytes));
      break;
    case DType::F16:
      convert(f16_to_f32, row, cols, out);
      break;
    case DType::BF16:
      convert(bf16_to_f32, row, cols, out);
      break;
    case DType::Q4_0:
      dequantize_blocks<BlockQ4_0, kBlock32>(row, cols, out);
      break;
    case DType::Q8_0:
      dequantize_blocks<BlockQ8_0, kBlock32>(row, cols, out);
      break;
    case DType::Q6_K:
      dequantize_blocks<BlockQ6_K, kBlock256>(row, cols, out);
      break;
  }
}

}  // namespace qwen2vl
