#pragma once

#include <cstdint>

#include "base/aligned_buffer.h"
#include "quant/block_types.h"

namespace qwen2vl::cpu {

/// Output features per panel: one AVX-512 register of 32-bit lanes, two of AVX2, four of NEON.
inline constexpr int64_t kPanelRows = 16;
/// Four consecutive k of every row of a panel, a byte each.
inline constexpr int64_t kGroupBytes = kPanelRows * 4;

/// A weight matrix [rows = out_features, cols = in_features] in the layout that the kernels stream: panels
/// of 16 rows, interleaved so that one vector load holds the same k of all 16. Rows that fill up the last
/// panel are zero. Panels of F32, F16 and BF16 are values [cols][16 rows]; those of a quantized type have the
/// parts that its QuantFormat asks for (each starts where the one before ends; panel_bytes is rounded up to
/// 64):
///
///   low bits        8: int8 [cols / 4][16 rows][4 consecutive k]
///                   4: [cols / 32][4 g][16 rows][4 bytes]: byte i of group g has value 4g + i of a block of
///                   32 in its low nibble and value 16 + 4g + i in its high nibble
///   high bits n     [cols / 32][n h][16 rows][4 bytes]: with a block's values numbered 4g + i (g in 0..7),
///                   the n bits from bit n f on of byte i of vector h belong to group g = n f + h
///   scales          16 bits: f16 [cols / 32][16 rows]; 8 bits: int8 [cols / part][16 rows]
///   block scales    of 8-bit scales: f16 [cols / 256][16 rows]
///   minima, block minima   as the scales
struct PanelMatrix {
  DType type = DType::F32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t panel_bytes = 0;
  const uint8_t* data = nullptr;  ///< 64-byte aligned

  int64_t panel_count() const { return (rows + kPanelRows - 1) / kPanelRows; }
  const uint8_t* panel(int64_t p) const { return data + p * panel_bytes; }
};

/// Byte offsets of the parts of a panel (see PanelMatrix).
struct PanelParts {
  int64_t high = 0;
  int64_t scales = 0;
  int64_t block_scales = 0;
  int64_t minima = 0;
  int64_t block_minima = 0;
  int64_t bytes = 0;  ///< of the whole panel, rounded up to 64
};
PanelParts panel_parts(DType type, int64_t cols);

/// Packs panel `panel` of a row-major GGUF matrix [rows, cols]; writes
/// panel_parts(type, cols).bytes at `out`.
void pack_panel(DType type, const uint8_t* matrix, int64_t rows, int64_t cols, int64_t panel, uint8_t* out);

/// One row of a packed matrix as float32 [cols] (the embedding look-up).
void dequantize_panel_row(const PanelMatrix& matrix, int64_t row, float* out);

}  // namespace qwen2vl::cpu
