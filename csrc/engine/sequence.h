#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/model.h"
#include "engine/page_pool.h"
#include "engine/sampler.h"

namespace qwen2vl {

/// A vision item of a prompt: its pad tokens start at `start`.
struct PromptImage {
  int64_t start = 0;
  GridTHW grid;
  std::array<uint8_t, 16> key{};
};

/// Token ids with the vision items that stand in them, checked against the model.
class Prompt {
 public:
  /// Throws std::invalid_argument for ids out of range and for items that do not fit the runs of pad tokens.
  Prompt(const ModelConfig& config, std::vector<int32_t> token_ids, std::vector<PromptImage> images);

  int64_t size() const { return static_cast<int64_t>(token_ids_.size()); }
  const std::vector<int32_t>& token_ids() const { return token_ids_; }
  const std::vector<PromptImage>& images() const { return images_; }
  const std::vector<Position>& positions() const { return positions_; }
  const std::vector<CellKey>& cells() const { return cells_; }
  int64_t image_cells(size_t image) const { return image_cells_[image]; }

 private:
  std::vector<int32_t> token_ids_;
  std::vector<PromptImage> images_;
  std::vector<int64_t> image_cells_;
  std::vector<Position> positions_;
  std::vector<CellKey> cells_;
};

/// One conversation: a KV cache and what stands in it. A call that is cancelled leaves whole cells only.
/// Calls on one must not overlap.
class Sequence {
 public:
  Sequence(std::shared_ptr<Model> model, int64_t n_ctx);

  int64_t size() const { return static_cast<int64_t>(cells_.size()); }
  int64_t n_ctx() const { return n_ctx_; }
  int64_t kv_bytes() const { return cache_->allocated_bytes(); }

  /// Keeps the longest common prefix of the cache and `prompt`, short of the prompt's last token; returns its
  /// length.
  int64_t reuse(const Prompt& prompt);

  /// Evaluates what `reuse` did not keep. embeddings[i]: [cells, hidden_size] of image i, or nullptr for one
  /// that lies wholly in the kept part. With LogitsWanted::All, `all_logits` takes [evaluated rows,
  /// vocab_size].
  void prefill(const Prompt& prompt, std::span<const float* const> embeddings, const Progress& progress,
               LogitsWanted wanted = LogitsWanted::Last, float* all_logits = nullptr);

  /// Evaluates one more text token after the last cell.
  void accept(int32_t token, const Progress& progress);
  /// One more token of each of several sequences of one model, none twice, in one forward pass.
  static void accept_together(std::span<Sequence* const> sequences, std::span<const int32_t> tokens,
                              const Progress& progress);

  /// [vocab_size] after the last cell; empty where it has not been evaluated.
  std::span<const float> logits();
  int32_t sample(Sampler& sampler);

 private:
  void require_acceptable(int32_t token) const;
  void forget_logits();
  void append(std::span<const int32_t> ids, std::span<const float* const> rows,
              std::span<const Position> positions, LogitsWanted wanted, float* logits,
              const Progress& progress);

  std::shared_ptr<Model> model_;
  int64_t n_ctx_;
  std::unique_ptr<KvCache> cache_;
  std::vector<CellKey> cells_;
  std::vector<int32_t> token_ids_;  // of the cells
  int32_t next_position_ = 0;       // of a text token after the last cell
  std::vector<float> logits_;       // after the last cell, where they are here
  bool on_device_ = false;          // ... and where they are still in cache_
};

}  // namespace qwen2vl
