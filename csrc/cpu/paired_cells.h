#pragma once

#include <cstdint>

#include "cpu/attention_tile.h"
#include "cpu/causal_attention.h"

namespace qwen2vl::cpu {

// Cells whose values, 32 KB in bf16 at head_dim 128, stay in the first-level cache for all rows of a tile.
inline constexpr int64_t kValueCells = 4 * kPageCells;

/// The cache of one sequence and key-value head as pairs of bf16 (see KernelTable). Behind a key's dimensions
/// stand those that the cache has split, first what rounding to bf16 leaves of them, then themselves again:
/// for the queries' rounded values and for what their rounding leaves.
struct PairedCells {
  uint16_t* keys = nullptr;    ///< [cell / 16][key_dims / 2][16 cells][2]
  uint16_t* values = nullptr;  ///< [cell / kValueCells][ceil(head_dim / 16)][kValueCells / 2][16 dims][2]

  static constexpr int64_t kValuePanel = kValueCells * kPanelRows;
  static int64_t blocks(int64_t cells) { return (cells + kValueCells - 1) / kValueCells; }
  static int64_t key_dims(const KvPages& cache, int64_t layer, int64_t head_dim) {
    return 2 * cache.key_dims(layer) - head_dim;
  }
  static int64_t key_elements(int64_t cells, int64_t key_dims) {
    return blocks(cells) * kValueCells * key_dims;
  }
  static int64_t elements(int64_t cells, int64_t head_dim, int64_t key_dims) {
    return key_elements(cells, key_dims) + blocks(cells) * panels(head_dim) * kValuePanel;
  }
  PairedCells() = default;
  PairedCells(uint16_t* data, int64_t cells, int64_t key_dims)
      : keys(data), values(data + key_elements(cells, key_dims)) {}

  /// Keys of a page whole (what lies beyond the last cell is never looked at), values up to the last cell.
  void pack_page(const KernelTable& kernels, const CausalRows& sequence, int64_t page, int64_t layer,
                 int64_t head, int64_t head_dim) const;
};

}  // namespace qwen2vl::cpu
