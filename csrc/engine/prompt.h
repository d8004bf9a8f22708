#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/page_pool.h"
#include "model/config.h"
#include "model/positions.h"

namespace qwen2vl {

/// An image or video as it is given: its size, and what identifies its pixels.
struct PromptImage {
  GridTHW grid;
  std::array<uint8_t, 16> key{};
};

/// Token ids with the images and videos that stand in them, checked against the model.
class Prompt {
 public:
  /// Throws std::invalid_argument for more than n_ctx tokens, for ids out of range and for images that do not
  /// fit the runs of pad tokens.
  Prompt(const ModelConfig& config, std::span<const int64_t> token_ids, std::span<const PromptImage> images,
         int64_t n_ctx);

  int64_t size() const { return static_cast<int64_t>(token_ids_.size()); }
  const std::vector<int32_t>& token_ids() const { return token_ids_; }
  const std::vector<VisionItem>& items() const { return items_; }
  const std::vector<Position>& positions() const { return positions_; }
  const std::vector<CellKey>& cells() const { return cells_; }
  /// Cells that two prompts begin with.
  int64_t common_prefix(const Prompt& other) const;

 private:
  std::vector<int32_t> token_ids_;
  std::vector<VisionItem> items_;
  std::vector<Position> positions_;
  std::vector<CellKey> cells_;
};

}  // namespace qwen2vl
