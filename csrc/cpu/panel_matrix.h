#pragma once

#include <cstdint>

#include "base/aligned_buffer.h"
#include "quant/block_types.h"

namespace qwen2vl::cpu {

/// Output features per panel: one AVX-512 register of 32-bit lanes, two of AVX2, four of NEON.
inline constexpr int64_t kPanelRows = 16;

/// A weight matrix [rows = out_features, cols = in_features] in the layout that the kernels stream: panels
/// of 16 rows, interleaved so that one vector load holds the same k of all 16. Rows that fill up the last
/// panel are zero. A panel, by type (each part starts where the one before ends; panel_bytes is rounded up to
/// 64):
///
///   F32, F16, BF16   values [cols][16 rows]
///   Q8_0             quants int8 [cols / 4][16 rows][4 consecutive k]
///                    scales f16 [cols / 32][16 rows]
///   Q4_0             quants [cols / 32][4 g][16 rows][4 bytes]: byte i of group g has value 4g + i of the
///                    32-value block in its low nibble and value 16 + 4g + i in its high nibble, both 0..15
///                    scales f16 [cols / 32][16 rows];  x = scale * (q - 8)
///   Q6_K             low bits as Q4_0's quants (4 of the 6 bits)
///                    high bits [cols / 32][2 h][16 rows][4 bytes]: with the block's values numbered 4g + i
///                    (g in 0..7), bits 2f..2f+1 of byte i of vector h belong to group g = 2f + h
///                    sub-scales int8 [cols / 32][2][16 rows], for values 0..15 and 16..31 of the block
///                    super-scales f16 [cols / 256][16 rows];  x = super * sub * (q - 32)
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
  int64_t high = 0;    ///< Q6_K high bits
  int64_t scales = 0;  ///< f16 scales (Q8_0, Q4_0), int8 sub-scales (Q6_K)
  int64_t super = 0;   ///< Q6_K super-scales
  int64_t bytes = 0;   ///< of the whole panel, rounded up to 64
};
PanelParts panel_parts(DType type, int64_t cols);

/// Packs panel `panel` of a row-major GGUF matrix [rows, cols]; writes
/// panel_parts(type, cols).bytes at `out`.
void pack_panel(DType type, const uint8_t* matrix, int64_t rows, int64_t cols, int64_t panel, uint8_t* out);

/// Columns `columns[0..n)` of panel `panel` of a quantized matrix as float32 [n][16].
void dequantize_panel_columns(const PanelMatrix& matrix, int64_t panel, const int32_t* columns, int64_t n,
                              float* out);

/// One row of a packed matrix as float32 [cols] (the embedding look-up).
void dequantize_panel_row(const PanelMatrix& matrix, int64_t row, float* out);

}  // namespace qwen2vl::cpu
