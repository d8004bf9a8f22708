#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/context.h"
#include "cpu/kv_cache.h"

namespace qwen2vl::cpu {

/// Rows [first_row, first_row + rows) of a batch, whose cells are the last `rows` of first_cell + rows in the
/// pages of its sequence.
struct CausalRows {
  const KvPages* cache = nullptr;
  std::span<const PageHandle> pages;
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t first_cell = 0;
  bool decoded = false;  ///< SequenceRows::decoded

  int64_t cells() const { return first_cell + rows; }
  const uint8_t* keys(int64_t page, int64_t layer, int64_t head) const {
    return cache->keys(pages[page], layer, head);
  }
  const uint8_t* values(int64_t page, int64_t layer, int64_t head) const {
    return cache->values(pages[page], layer, head);
  }
};

struct CausalTask;

/// Causal grouped-query attention over the paged cache. qkv rows hold the rotated queries in their first
/// num_attention_heads * head_dim columns; the result replaces them. The query heads of one key-value head
/// are computed together, so each key and value is read once for all of them.
///
/// Decoded tokens read the cache as it is, with float32 products, in pieces of kSplitPages that are merged
/// then: one token alone gives work to several threads. With `paired_products`, in the fast precision and
/// where bf16 dot products are the faster ones, prompts have their cells converted to bf16 first, once a call
/// and head.
class CausalAttention {
 public:
  explicit CausalAttention(const TextConfig& config, bool paired_products = true)
      : config_(config), paired_products_(paired_products) {}
  void operator()(Context& ctx, int64_t layer, std::span<const CausalRows> sequences, float* qkv,
                  int64_t qkv_stride);

 private:
  /// Rows of queries, keys and values side by side, and the layer that they are of.
  struct QkvRows {
    int64_t layer;
    float* qkv;
    int64_t stride;
  };
  void run_decoded(Context& ctx, const QkvRows& rows, std::span<const CausalRows> sequences);
  void run_paired(Context& ctx, const QkvRows& rows, std::span<const CausalRows> sequences);
  void run_tasks(Context& ctx, const QkvRows& rows, const std::vector<CausalTask>& tasks);

  TextConfig config_;
  bool paired_products_;
  FloatBuffer paired_;   ///< [head in flight][sequence]: cells as pairs of bf16
  FloatBuffer partial_;  ///< [task][rows][head_dim + 2]: unnormalized output, maximum, sum
};

}  // namespace qwen2vl::cpu
