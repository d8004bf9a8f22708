#include "cpu/panel_matrix.h"

#include <algorithm>
#include <cstring>

#include "base/half.h"

namespace qwen2vl::cpu {
namespace {

constexpr int64_t kGroupBytes = kPanelRows * 4;  ///< four consecutive k of every row of the panel

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

/// Q8_0 and Q4_0: the block's bytes are already in the panel's order, four at a time.
template <typename Block>
void pack_blocks32(const uint8_t* matrix, int64_t row_stride, int64_t lanes, int64_t cols,
                   const PanelParts& parts, uint8_t* out) {
  constexpr int64_t kGroups = sizeof(Block::qs) / 4;
  for (int64_t b = 0; b < cols / kBlock32; ++b) {
    for (int64_t r = 0; r < lanes; ++r) {
      Block block;
      std::memcpy(&block, matrix + r * row_stride + b * sizeof(Block), sizeof(Block));
      uint8_t* quants = out + b * kGroups * kGroupBytes + r * 4;
      for (int64_t g = 0; g < kGroups; ++g) std::memcpy(quants + g * kGroupBytes, &block.qs[4 * g], 4);
      std::memcpy(out + parts.scales + (b * kPanelRows + r) * 2, &block.d, 2);
    }
  }
}

/// Values 32 t .. 32 t + 31 of one half of a super-block (see BlockQ6_K).
void pack_q6_block32(const uint8_t* ql, const uint8_t* qh, int t, uint8_t* low, uint8_t* high) {
  const uint8_t* nibbles = ql + 32 * (t & 1);
  const int shift = 4 * (t >> 1);
  for (int g = 0; g < 4; ++g) {
    const uint32_t first = (load_u32(nibbles + 4 * g) >> shift) & 0x0f0f0f0fu;
    const uint32_t second = (load_u32(nibbles + 16 + 4 * g) >> shift) & 0x0f0f0f0fu;
    store_u32(low + g * kGroupBytes, first | (second << 4));
  }
  for (int h = 0; h < 2; ++h) {
    uint32_t word = 0;
    for (int f = 0; f < 4; ++f)
      word |= ((load_u32(qh + 4 * (2 * f + h)) >> (2 * t)) & 0x03030303u) << (2 * f);
    store_u32(high + h * kGroupBytes, word);
  }
}

void pack_q6(const uint8_t* matrix, int64_t row_stride, int64_t lanes, int64_t cols, const PanelParts& parts,
             uint8_t* out) {
  for (int64_t super = 0; super < cols / kBlock256; ++super) {
    for (int64_t r = 0; r < lanes; ++r) {
      BlockQ6_K block;
      std::memcpy(&block, matrix + r * row_stride + super * sizeof(BlockQ6_K), sizeof block);
      for (int s = 0; s < 8; ++s) {
        const int64_t b = super * 8 + s;
        pack_q6_block32(block.ql + 64 * (s / 4), block.qh + 32 * (s / 4), s % 4,
                        out + b * 4 * kGroupBytes + r * 4, out + parts.high + b * 2 * kGroupBytes + r * 4);
        for (int h = 0; h < 2; ++h) {
          out[parts.scales + (b * 2 + h) * kPanelRows + r] = static_cast<uint8_t>(block.scales[2 * s + h]);
        }
      }
      std::memcpy(out + parts.super + (super * kPanelRows + r) * 2, &block.d, 2);
    }
  }
}

float load_f16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof half);
  return f16_to_f32(half);
}

/// The nibble of value i (0..31) of block b, lane r, of Q4_0's quants.
int nibble(const uint8_t* quants, int64_t b, int i, int64_t r) {
  const uint8_t byte = quants[(b * 4 + (i % 16) / 4) * kGroupBytes + r * 4 + i % 4];
  return i < 16 ? byte & 0xf : byte >> 4;
}

void dequantize_q8_row(const uint8_t* panel, const PanelParts& parts, int64_t r, int64_t cols, float* out) {
  for (int64_t k = 0; k < cols; ++k) {
    const float scale = load_f16(panel + parts.scales + (k / kBlock32 * kPanelRows + r) * 2);
    out[k] = scale * static_cast<float>(static_cast<int8_t>(panel[k / 4 * kGroupBytes + r * 4 + k % 4]));
  }
}

void dequantize_q4_row(const uint8_t* panel, const PanelParts& parts, int64_t r, int64_t cols, float* out) {
  for (int64_t b = 0; b < cols / kBlock32; ++b) {
    const float scale = load_f16(panel + parts.scales + (b * kPanelRows + r) * 2);
    for (int i = 0; i < kBlock32; ++i) {
      out[b * kBlock32 + i] = scale * static_cast<float>(nibble(panel, b, i, r) - 8);
    }
  }
}

void dequantize_q6_row(const uint8_t* panel, const PanelParts& parts, int64_t r, int64_t cols, float* out) {
  for (int64_t b = 0; b < cols / kBlock32; ++b) {
    const float super = load_f16(panel + parts.super + (b / 8 * kPanelRows + r) * 2);
    for (int i = 0; i < kBlock32; ++i) {
      const int g = i / 4;
      const int sub = static_cast<int8_t>(panel[parts.scales + (b * 2 + i / 16) * kPanelRows + r]);
      const int high = panel[parts.high + (b * 2 + g % 2) * kGroupBytes + r * 4 + i % 4] >> (2 * (g / 2)) & 3;
      const int q = nibble(panel, b, i, r) | high << 4;
      out[b * kBlock32 + i] = super * static_cast<float>(sub) * static_cast<float>(q - 32);
    }
  }
}

}  // namespace

PanelParts panel_parts(DType type, int64_t cols) {
  PanelParts parts;
  switch (type) {
    case DType::F32:
      parts.bytes = cols * kPanelRows * 4;
      break;
    case DType::F16:
    case DType::BF16:
      parts.bytes = cols * kPanelRows * 2;
      break;
    case DType::Q8_0:
    case DType::Q4_0:
      parts.scales = cols * kPanelRows / (type == DType::Q8_0 ? 1 : 2);
      parts.bytes = parts.scales + cols / kBlock32 * kPanelRows * 2;
      break;
    case DType::Q6_K:
      parts.high = cols * kPanelRows / 2;
      parts.scales = parts.high + cols * kPanelRows / 4;
      parts.super = parts.scales + cols / 16 * kPanelRows;
      parts.bytes = parts.super + cols / kBlock256 * kPanelRows * 2;
      break;
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
  switch (type) {
    case DType::F32:
      return pack_values<uint32_t>(first, row_stride, lanes, cols, out);
    case DType::F16:
    case DType::BF16:
      return pack_values<uint16_t>(first, row_stride, lanes, cols, out);
    case DType::Q8_0:
      return pack_blocks32<BlockQ8_0>(first, row_stride, lanes, cols, parts, out);
    case DType::Q4_0:
      return pack_blocks32<BlockQ4_0>(first, row_stride, lanes, cols, parts, out);
    case DType::Q6_K:
      return pack_q6(first, row_stride, lanes, cols, parts, out);
  }
}

void dequantize_panel_row(const PanelMatrix& matrix, int64_t row, float* out) {
  const PanelParts parts = panel_parts(matrix.type, matrix.cols);
  const uint8_t* panel = matrix.panel(row / kPanelRows);
  const int64_t r = row % kPanelRows;
  switch (matrix.type) {
    case DType::F32:
      for (int64_t k = 0; k < matrix.cols; ++k) std::memcpy(out + k, panel + (k * kPanelRows + r) * 4, 4);
      return;
    case DType::F16:
      for (int64_t k = 0; k < matrix.cols; ++k) out[k] = load_f16(panel + (k * kPanelRows + r) * 2);
      return;
    case DType::BF16:
      for (int64_t k = 0; k < matrix.cols; ++k) {
        uint16_t half;
        std::memcpy(&half, panel + (k * kPanelRows + r) * 2, sizeof half);
        out[k] = bf16_to_f32(half);
      }
      return;
    case DType::Q8_0:
      return dequantize_q8_row(panel, parts, r, matrix.cols, out);
    case DType::Q4_0:
      return dequantize_q4_row(panel, parts, r, matrix.cols, out);
    case DType::Q6_K:
      return dequantize_q6_row(panel, parts, r, matrix.cols, out);
  }
}

void dequantize_panel_columns(const PanelMatrix& matrix, int64_t panel, const int32_t* columns, int64_t n,
                              float* out) {
  const PanelParts parts = panel_parts(matrix.type, matrix.cols);
  const uint8_t* p = matrix.panel(panel);
  for (int64_t c = 0; c < n; ++c, out += kPanelRows) {
    const int64_t k = columns[c], b = k / kBlock32;
    const int i = static_cast<int>(k % kBlock32);
    const int half = i / 16, g = i / 4;
    for (int64_t r = 0; r < kPanelRows; ++r) {
      if (matrix.type == DType::Q8_0) {
        const auto q = static_cast<int8_t>(p[k / 4 * kGroupBytes + r * 4 + k % 4]);
        out[r] = load_f16(p + parts.scales + (b * kPanelRows + r) * 2) * static_cast<float>(q);
      } else if (matrix.type == DType::Q4_0) {
        out[r] = load_f16(p + parts.scales + (b * kPanelRows + r) * 2) *
                 static_cast<float>(nibble(p, b, i, r) - 8);
      } else {
        const auto sub = static_cast<int8_t>(p[parts.scales + (b * 2 + half) * kPanelRows + r]);
        const int high = p[parts.high + (b * 2 + g % 2) * kGroupBytes + r * 4 + i % 4] >> (2 * (g / 2)) & 3;
        out[r] = load_f16(p + parts.super + (b / 8 * kPanelRows + r) * 2) * static_cast<float>(sub) *
                 static_cast<float>((nibble(p, b, i, r) | high << 4) - 32);
      }
    }
  }
}

}  // namespace qwen2vl::cpu
