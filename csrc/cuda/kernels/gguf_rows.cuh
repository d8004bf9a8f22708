#pragma once

// Values of rows as GGUF stores them (quant/block_types.h): for packing, and for the plain kernels.

#include <cstring>

#include "cuda/chip.h"
#include "quant/formats.h"
#include "quant/open_block.h"

namespace qwen2vl::cuda {

/// What of a row one thread takes apart: a block, or 32 of floats.
template <DType T>
struct RowPiece {
  static constexpr DTypeTraits kTraits = traits_of(T);
  static constexpr int kBits = kTraits.format.bits();
  static constexpr bool kQuantized = kBits != 0;
  static constexpr int kColumns = kQuantized ? static_cast<int>(kTraits.block_elements) : 32;
  static constexpr int kBytes = static_cast<int>(kTraits.block_bytes) * (kQuantized ? 1 : kColumns);
};

/// Value k of a row of floats.
template <DType T>
CHIP_DEVICE float float_value(const uint8_t* row, int64_t k) {
  static_assert(!RowPiece<T>::kQuantized);
  if constexpr (T == DType::F32) return reinterpret_cast<const float*>(row)[k];
  const uint16_t half = reinterpret_cast<const uint16_t*>(row)[k];
  return T == DType::F16 ? unpack_f16(half).x : unpack_bf16(half).x;
}

/// kIq4[8 half .. + 7], a byte each.
constexpr uint64_t iq4_values(int half) {
  uint64_t bytes = 0;
  for (int i = 0; i < 8; ++i) bytes |= (static_cast<uint64_t>(kIq4[8 * half + i]) & 255u) << (8 * i);
  return bytes;
}

template <int kHalf>
inline constexpr uint64_t kIq4Values = iq4_values(kHalf);

/// Value i of a block, computed as dequantize_row does.
template <DType T>
CHIP_DEVICE float opened_value(const OpenBlock& block, int i) {
  constexpr QuantFormat kFormat = RowPiece<T>::kTraits.format;
  constexpr int kPart = kFormat.part, kOffset = kFormat.offset;
  const int part = i / kPart;
  int q = block.q[i];
  if constexpr (kFormat.has_table)
    q = static_cast<int8_t>((q < 8 ? kIq4Values<0> : kIq4Values<1>) >> (8 * (q % 8)) & 255u);
  else if constexpr (RowPiece<T>::kBits == 8)
    q = static_cast<int8_t>(q);
  else
    q -= kOffset;
  float scale = unpack_f16(block.d).x;
  if constexpr (kFormat.scale_bits < 16) scale *= static_cast<float>(block.scales[part]);
  float x = scale * static_cast<float>(q);
  if constexpr (kFormat.has_minimum) {
    float minimum = unpack_f16(block.m).x;
    if constexpr (kFormat.scale_bits < 16) minimum *= static_cast<float>(block.minima[part]);
    x -= minimum;
  }
  return x;
}

/// fn(column, value) for the columns of a row's piece.
template <DType T, typename Fn>
CHIP_DEVICE void values_of(const uint8_t* row, int64_t cols, int64_t piece, const Fn& fn) {
  constexpr int kColumns = RowPiece<T>::kColumns, kBytes = RowPiece<T>::kBytes;
  const int64_t begin = piece * kColumns;
  if constexpr (RowPiece<T>::kQuantized) {
    OpenBlock block;
    open_block_at<T>(row + piece * kBytes, block);
    for (int i = 0; i < kColumns; ++i) fn(begin + i, opened_value<T>(block, i));
  } else {
    for (int64_t k = begin; k < min(begin + kColumns, cols); ++k) fn(k, float_value<T>(row, k));
  }
}

}  // namespace qwen2vl::cuda
