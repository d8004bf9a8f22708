#include "engine/prompt.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace qwen2vl {

Prompt::Prompt(const ModelConfig& config, std::span<const int64_t> token_ids,
               std::span<const PromptImage> images, int64_t n_ctx) {
  if (token_ids.empty()) throw std::invalid_argument("token_ids: expected integers [n], n > 0, found none");
  std::vector<GridTHW> grids;
  int64_t of_images = 0;
  for (const PromptImage& image : images) {
    grids.push_back(image.grid);
    if (config.vision) of_images += vision_cells(image.grid, *config.vision);
  }
  if (std::ssize(token_ids) > n_ctx)
    throw std::invalid_argument("the prompt takes " + std::to_string(token_ids.size()) + " tokens, " +
                                std::to_string(of_images) + " of them for " + std::to_string(images.size()) +
                                " image(s), but the context holds " + std::to_string(n_ctx) + " (n_ctx)");
  token_ids_.reserve(token_ids.size());
  for (const int64_t id : token_ids) {
    if (id < 0 || id >= config.text.vocab_size)
      throw std::invalid_argument("token_ids[" + std::to_string(token_ids_.size()) + "]: expected 0.." +
                                  std::to_string(config.text.vocab_size - 1) + ", found " +
                                  std::to_string(id));
    token_ids_.push_back(static_cast<int32_t>(id));
  }
  items_ = find_items(token_ids_, grids, config);
  positions_ = mrope_positions(size(), items_, config.vision ? config.vision->spatial_merge_size : 1);
  for (const int32_t id : token_ids_) cells_.push_back({id});
  for (size_t i = 0; i < items_.size(); ++i)
    for (int64_t at = items_[i].start; at < items_[i].end; ++at) {
      cells_[at].patch = static_cast<int32_t>(at - items_[i].start);
      cells_[at].grid = images[i].grid;
      cells_[at].image = images[i].key;
    }
}

int64_t Prompt::common_prefix(const Prompt& other) const {
  const auto differ = std::mismatch(cells_.begin(), cells_.end(), other.cells_.begin(), other.cells_.end());
  return differ.first - cells_.begin();
}

}  // namespace qwen2vl
