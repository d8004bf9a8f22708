#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "engine/page_pool.h"
#include "model/config.h"
#include "model/positions.h"

namespace qwen2vl {

/// An image or video of a prompt: its pad tokens start at `start`.
struct PromptImage {
  int64_t start = 0;
  GridTHW grid;
  std::array<uint8_t, 16> key{};
};

/// Token ids with the images and videos that stand in them, checked against the model.
class Prompt {
 public:
  /// Throws std::invalid_argument for ids out of range and for images that do not fit the runs of pad tokens.
  Prompt(const ModelConfig& config, std::vector<int32_t> token_ids, std::vector<PromptImage> images);

  int64_t size() const { return static_cast<int64_t>(token_ids_.size()); }
  const std::vector<int32_t>& token_ids() const { return token_ids_; }
  const std::vector<PromptImage>& images() const { return images_; }
  const std::vector<Position>& positions() const { return positions_; }
  const std::vector<CellKey>& cells() const { return cells_; }
  int64_t image_cells(size_t image) const { return image_cells_[image]; }
  /// Cells that two prompts begin with.
  int64_t common_prefix(const Prompt& other) const;

 private:
  std::vector<int32_t> token_ids_;
  std::vector<PromptImage> images_;
  std::vector<int64_t> image_cells_;
  std::vector<Position> positions_;
  std::vector<CellKey> cells_;
};

}  // namespace qwen2vl
