#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/attention_tile.h"
#include "cpu/causal_attention.h"
#include "cpu/paired_cells.h"

namespace qwen2vl::cpu {

/// Some query tokens of one key-value head against some pages.
struct CausalTask {
  const CausalRows* sequence;
  int64_t head;                    ///< key-value head
  int64_t token_begin, token_end;  ///< within the sequence's rows
  int64_t page_begin, page_end;
  PairedCells paired = {};  ///< where the products are of bf16
};

/// Tokens of a tile, with all query heads of a key-value head each, and the rows that these are.
int64_t causal_tile_tokens(const TextConfig& config);
int64_t causal_tile_rows(const TextConfig& config);

/// A task at work: queries in, streaming softmax over its pages, result out.
class CausalTile {
 public:
  static size_t scratch_bytes(int64_t rows, int64_t head_dim);

  CausalTile(const KernelTable& kernels, const TextConfig& config, int64_t layer, const CausalTask& task,
             std::byte* scratch);

  void gather_queries(const float* qkv, int64_t stride);
  void run();
  /// The normalized result to where the queries stood.
  void scatter_output(float* qkv, int64_t stride) const;
  /// The result as it is, [rows][head_dim + 2]: unnormalized output, maximum, sum.
  void save_partial(float* out) const;

 private:
  bool paired() const { return task_.paired.keys != nullptr; }
  /// How many cells a token sees: those up to its own.
  int64_t visible(int64_t token) const { return task_.sequence->first_cell + token + 1; }
  const float* query(const float* qkv, int64_t stride, int64_t r) const;

  template <typename Softmax, typename Clear>
  void for_tokens(int64_t cell, int64_t cells, const Softmax& softmax, const Clear& clear);
  /// Products of bf16 pairs with the n cells from `cell`.
  void paired_step(int64_t cell, int64_t n);
  /// float32 products with the n cells from `cell`, page by page as the cache holds them.
  void step(int64_t cell, int64_t n);
  /// `ahead`: the panels of the next call.
  void gemm(const float* a, int64_t a_stride, const uint8_t* b, int64_t panel, int64_t n_cols, int64_t depth,
            const MatmulOutput& out, const uint8_t* ahead) const;

  const KernelTable& kernels_;
  int64_t head_dim_, group_, layer_;
  const CausalTask& task_;
  std::span<const int32_t> split_;
  int64_t key_dims_;
  int64_t rows_;
  Tile tile_;
  uint16_t* probabilities_;   // [rows][kStepCells], paired only
  uint16_t* paired_queries_;  // [rows][key_dims], likewise
  float scale_;
};

}  // namespace qwen2vl::cpu
