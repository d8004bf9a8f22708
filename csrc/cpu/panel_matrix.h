#pragma once

#include <algorithm>
#include <cstdint>

#include "base/aligned_buffer.h"
#include "quant/block_types.h"

namespace qwen2vl::cpu {

/// Output features per panel: one AVX-512 register of 32-bit lanes, two of AVX2, four of NEON.
inline constexpr int64_t kPanelRows = 16;

/// How a panel's integers are interleaved: so many bytes of a row stand side by side, behind them as many of
/// the next row. It is the kernel table's choice: 4 where a lane takes one row's products (VNNI, maddubs,
/// sdot), 8 where an instruction multiplies small matrices (smmla).
struct PanelLayout {
  int64_t run = 4;  ///< 4, 8 or 16

  /// Of a part with `bits` bits a value: the bytes of a row side by side,
  int64_t run_of(int bits) const { return bits == 3 ? 4 : std::min<int64_t>(run, 4 * bits); }
  /// and where byte `byte` of a row's block stands.
  int64_t offset(int bits, int64_t block, int64_t row, int64_t byte) const {
    const int64_t n = run_of(bits);  // a power of two
    return (block * 4 * bits + (byte & -n)) * kPanelRows + row * n + (byte & (n - 1));
  }
  bool operator==(const PanelLayout&) const = default;
};

/// A weight matrix [rows = out_features, cols = in_features] in the layout that the kernels stream: panels
/// of 16 rows. Rows that fill up the last panel are zero. Panels of F32, F16 and BF16 are values
/// [cols][16 rows]; those of a quantized type have the parts that its QuantFormat asks for (each starts where
/// the one before ends; panel_bytes is rounded up to 64):
///
///   low, high bits  [cols / 32][4n / run][16 rows][run bytes], n bits a value, run = layout.run_of(n): 32
///                   values of a row are 4n bytes, and value k is the n bits from bit n (k / 4n) on of byte
///                   k % 4n. Of 3 bits, byte j of the row's i-th word of 4 has values 4i + j and 16 + 4i + j
///                   and two bits more: of 12 + j (i = 0) and of 28 + j (1) the low ones, of both the high
///                   one (2)
///   scales          16 bits: f16 [cols / 32][16 rows]; 8 bits: int8 [cols / part][16 rows]; 4 bits: the
///                   same, a minimum above each
///   block scales    of fewer bits than 16: f16 [cols / 256][16 rows]
///   minima, block minima   as the scales
struct PanelMatrix {
  DType type = DType::F32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t panel_bytes = 0;
  const uint8_t* data = nullptr;  ///< 64-byte aligned
  PanelLayout layout = {};

  int64_t panel_count() const { return (rows + kPanelRows - 1) / kPanelRows; }
  const uint8_t* panel(int64_t p) const { return data + p * panel_bytes; }
};

/// Byte offsets of the parts of a panel (see PanelMatrix).
struct PanelParts {
  int64_t high = 0;
  int64_t scales = 0;
  int64_t block_scales = 0;
  int64_t minima = 0;  ///< of 4 bits: the scales'
  int64_t block_minima = 0;
  int64_t bytes = 0;  ///< of the whole panel, rounded up to 64
};
PanelParts panel_parts(DType type, int64_t cols);

/// Packs panel `panel` of `source`, a row-major GGUF matrix of `rows` rows, as a panel of `packed` (its type,
/// columns and layout): packed.panel_bytes at `out`.
void pack_panel(const PanelMatrix& packed, const uint8_t* source, int64_t rows, int64_t panel, uint8_t* out);

/// One row of a packed matrix as float32 [cols] (the embedding look-up).
void dequantize_panel_row(const PanelMatrix& matrix, int64_t row, float* out);

}  // namespace qwen2vl::cpu
