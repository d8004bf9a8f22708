#pragma once

// Values of rows as GGUF stores them (quant/block_types.h), one at a time: for packing, and for the plain
// kernels.

#include "cuda/chip.h"
#include "quant/block_types.h"

namespace qwen2vl::cuda {

CHIP_DEVICE float f16_at(const uint8_t* p) {
  return unpack_f16(static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8).x;
}

CHIP_DEVICE int q6_k_value(const uint8_t* block, int i) {
  const int half = i / 128, l = i % 32, quarter = i % 128 / 32;
  const int low = block[64 * half + 32 * (quarter % 2) + l] >> (quarter < 2 ? 0 : 4) & 15;
  const int high = block[128 + 32 * half + l] >> (2 * quarter) & 3;
  return low | high << 4;
}

/// The stored integer of a quantized row: 0..15, -128..127, 0..63.
CHIP_DEVICE int stored_value(DType type, const uint8_t* row, int64_t k) {
  switch (type) {
    case DType::Q4_0: {
      const uint8_t byte = row[k / 32 * 18 + 2 + k % 16];
      return k % 32 < 16 ? byte & 15 : byte >> 4;
    }
    case DType::Q8_0:
      return static_cast<int8_t>(row[k / 32 * 34 + 2 + k % 32]);
    case DType::Q6_K:
      return q6_k_value(row + k / 256 * 210, static_cast<int>(k % 256));
    default:  // the host refuses other types (format_of)
      return 0;
  }
}

/// Value k of a row.
CHIP_DEVICE float row_value(DType type, const uint8_t* row, int64_t k) {
  switch (type) {
    case DType::F32:
      return reinterpret_cast<const float*>(row)[k];
    case DType::F16:
      return f16_at(row + 2 * k);
    case DType::BF16:
      return unpack_bf16(reinterpret_cast<const uint16_t*>(row)[k]).x;
    case DType::Q4_0:
      return f16_at(row + k / 32 * 18) * static_cast<float>(stored_value(type, row, k) - 8);
    case DType::Q8_0:
      return f16_at(row + k / 32 * 34) * static_cast<float>(stored_value(type, row, k));
    case DType::Q6_K: {
      const uint8_t* block = row + k / 256 * 210;
      const float scale = static_cast<float>(static_cast<int8_t>(block[192 + k % 256 / 16]));
      return f16_at(block + 208) * scale * static_cast<float>(stored_value(type, row, k) - 32);
    }
    default:
      return 0;
  }
}

}  // namespace qwen2vl::cuda
