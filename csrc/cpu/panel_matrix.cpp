#include "cpu/panel_matrix.h"

#include <algorithm>
#include <cstring>

#include "cpu/panel_decoder.h"
#include "quant/open_block.h"

namespace qwen2vl::cpu {
namespace {

uint32_t load_u32(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

void store_u32(uint8_t* p, uint32_t word) { std::memcpy(p, &word, sizeof word); }

/// values [cols][16]. A strip of each row is read at a time: rows whose length is a power of two share their
/// cache sets, so that column after column would evict the lines before they are used up.
template <typename T>
void pack_values(const uint8_t* matrix, int64_t row_stride, int64_t lanes, int64_t cols, uint8_t* out) {
  constexpr int64_t kStrip = 64 / sizeof(T);
  for (int64_t begin = 0; begin < cols; begin += kStrip) {
    const int64_t n = std::min(kStrip, cols - begin);
    T strip[kStrip][kPanelRows] = {};
    for (int64_t r = 0; r < lanes; ++r) {
      T values[kStrip];
      std::memcpy(values, matrix + r * row_stride + begin * sizeof(T), n * sizeof(T));
      for (int64_t k = 0; k < n; ++k) strip[k][r] = values[k];
    }
    std::memcpy(out + begin * kPanelRows * sizeof(T), strip, n * kPanelRows * sizeof(T));
  }
}

/// 32 integers of row r to block b of a panel's low and high bits.
template <DType T>
void pack_quants(const uint8_t* q, int64_t b, int64_t r, const PanelParts& parts, uint8_t* out) {
  constexpr QuantFormat kFormat = traits_of(T).format;
  constexpr int kVectors = kFormat.low_bits;  // of 64 bytes, for 128 nibbles or 64 bytes each
  uint8_t* low = out + b * kVectors * kGroupBytes + r * 4;
  for (int g = 0; g < kVectors; ++g) {
    const uint32_t word = load_u32(q + 4 * g);
    if constexpr (kFormat.low_bits == 8)
      store_u32(low + g * kGroupBytes, word);
    else
      store_u32(low + g * kGroupBytes, (word & 0x0f0f0f0fu) | (load_u32(q + 16 + 4 * g) & 0x0f0f0f0fu) << 4);
  }
  if constexpr (constexpr int n = kFormat.high_bits; n > 0) {
    constexpr uint32_t kMask = 0x01010101u * ((1u << n) - 1);
    uint8_t* high = out + parts.high + b * n * kGroupBytes + r * 4;
    for (int h = 0; h < n; ++h) {
      uint32_t word = 0;
      for (int f = 0; f < 8 / n; ++f) word |= (load_u32(q + 4 * (n * f + h)) >> 4 & kMask) << (n * f);
      store_u32(high + h * kGroupBytes, word);
    }
  }
}

template <DType T>
void pack_blocks(const uint8_t* matrix, int64_t row_stride, int64_t lanes, int64_t cols,
                 const PanelParts& parts, uint8_t* out) {
  constexpr DTypeTraits kTraits = traits_of(T);
  constexpr QuantFormat kFormat = kTraits.format;
  constexpr int64_t kBlocks32 = kTraits.block_elements / kBlock32,
                    kParts = kTraits.block_elements / kFormat.part;
  OpenBlock block;
  for (int64_t i = 0; i < cols / kTraits.block_elements; ++i) {
    for (int64_t r = 0; r < lanes; ++r) {
      open_block_at<T>(matrix + r * row_stride + i * kTraits.block_bytes, block);
      for (int64_t b = 0; b < kBlocks32; ++b)
        pack_quants<T>(block.q + b * kBlock32, i * kBlocks32 + b, r, parts, out);
      const auto pack_scales = [&](int64_t values, int64_t block_values, uint16_t half, const int8_t* bytes) {
        if constexpr (kFormat.scale_bits == 8)
          for (int64_t p = 0; p < kParts; ++p)
            out[values + (i * kParts + p) * kPanelRows + r] = static_cast<uint8_t>(bytes[p]);
        std::memcpy(out + (kFormat.scale_bits == 8 ? block_values : values) + (i * kPanelRows + r) * 2, &half,
                    2);
      };
      pack_scales(parts.scales, parts.block_scales, block.d, block.scales);
      if constexpr (kFormat.has_minimum) pack_scales(parts.minima, parts.block_minima, block.m, block.minima);
    }
  }
}

}  // namespace

PanelParts panel_parts(DType type, int64_t cols) {
  const DTypeTraits& traits = dtype_traits(type);
  const QuantFormat& format = traits.format;
  PanelParts parts;
  if (format.bits() == 0) {
    parts.bytes = cols * kPanelRows * traits.block_bytes;
  } else {
    const int64_t scales = cols / format.part * kPanelRows * format.scale_bits / 8;
    const int64_t block_scales = format.scale_bits == 8 ? cols / kBlock256 * kPanelRows * 2 : 0;
    parts.high = cols * kPanelRows * format.low_bits / 8;
    parts.scales = parts.high + cols * kPanelRows * format.high_bits / 8;
    parts.block_scales = parts.scales + scales;
    parts.minima = parts.block_scales + block_scales;
    parts.block_minima = parts.minima + (format.has_minimum ? scales : 0);
    parts.bytes = parts.block_minima + (format.has_minimum ? block_scales : 0);
  }
  parts.bytes = (parts.bytes + 63) / 64 * 64;
  return parts;
}

void pack_panel(DType type, const uint8_t* matrix, int64_t rows, int64_t cols, int64_t panel, uint8_t* out) {
  const PanelParts parts = panel_parts(type, cols);
  const int64_t row_stride = row_bytes(type, cols);
  const int64_t lanes = std::min(kPanelRows, rows - panel * kPanelRows);
  const uint8_t* first = matrix + panel * kPanelRows * row_stride;
  if (lanes < kPanelRows) std::memset(out, 0, parts.bytes);
  visit_dtype(type, [&]<DType T>() {
    if constexpr (T == DType::F32)
      pack_values<uint32_t>(first, row_stride, lanes, cols, out);
    else if constexpr (T == DType::F16 || T == DType::BF16)
      pack_values<uint16_t>(first, row_stride, lanes, cols, out);
    else
      pack_blocks<T>(first, row_stride, lanes, cols, parts, out);
  });
}

void dequantize_panel_row(const PanelMatrix& matrix, int64_t row, float* out) {
  const int64_t index = row / kPanelRows, r = row % kPanelRows;
  const uint8_t* panel = matrix.panel(index);
  visit_dtype(matrix.type, [&]<DType T>() {
    const auto fill = [&](const auto& value) {
      for (int64_t k = 0; k < matrix.cols; ++k) out[k] = value(k);
    };
    const auto half = [&](int64_t k) {
      uint16_t bits;
      std::memcpy(&bits, panel + (k * kPanelRows + r) * 2, sizeof bits);
      return bits;
    };
    if constexpr (T == DType::F32) {
      for (int64_t k = 0; k < matrix.cols; ++k) std::memcpy(out + k, panel + (k * kPanelRows + r) * 4, 4);
    } else if constexpr (T == DType::F16) {
      fill([&](int64_t k) { return f16_to_f32(half(k)); });
    } else if constexpr (T == DType::BF16) {
      fill([&](int64_t k) { return bf16_to_f32(half(k)); });
    } else {
      const PanelDecoder<T> decoder(matrix, index);
      fill([&](int64_t k) { return decoder.value(k, r); });
    }
  });
}

}  // namespace qwen2vl::cpu
