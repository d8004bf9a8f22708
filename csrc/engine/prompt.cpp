#include "engine/prompt.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace qwen2vl {

Prompt::Prompt(const ModelConfig& config, std::vector<int32_t> token_ids, std::vector<PromptImage> images)
    : token_ids_(std::move(token_ids)), images_(std::move(images)) {
  if (token_ids_.empty()) throw std::invalid_argument("the prompt is empty");
  for (size_t i = 0; i < token_ids_.size(); ++i)
    if (token_ids_[i] < 0 || token_ids_[i] >= config.text.vocab_size)
      throw std::invalid_argument("token " + std::to_string(i) + ": expected an id below " +
                                  std::to_string(config.text.vocab_size) + ", found " +
                                  std::to_string(token_ids_[i]));
  std::vector<GridTHW> grids;
  for (const PromptImage& image : images_) grids.push_back(image.grid);
  positions_ = mrope_positions(token_ids_, grids, config);

  cells_.resize(token_ids_.size());
  for (size_t i = 0; i < token_ids_.size(); ++i) cells_[i].token = token_ids_[i];
  int64_t end = 0;
  for (size_t i = 0; i < images_.size(); ++i) {
    const PromptImage& image = images_[i];
    image_cells_.push_back(vision_cells(image.grid, *config.vision));
    // mrope_positions has found a run for every grid; the starts given must be those of the runs.
    const int64_t last = image.start + image_cells_[i] - 1;
    const auto is_pad = [&](int64_t at) {
      return token_ids_[at] == config.text.image_token_id || token_ids_[at] == config.text.video_token_id;
    };
    bool fits = image.start >= end && last < size();
    for (int64_t at = end; fits && at < image.start; ++at) fits = !is_pad(at);
    for (int64_t at = image.start; fits && at <= last; ++at) fits = is_pad(at);
    if (!fits)
      throw std::invalid_argument("image " + std::to_string(i) + ": no run of " +
                                  std::to_string(image_cells_[i]) + " pad tokens starts at token " +
                                  std::to_string(image.start));
    for (int64_t c = 0; c < image_cells_[i]; ++c) {
      CellKey& cell = cells_[image.start + c];
      cell.patch = static_cast<int32_t>(c);
      cell.grid = image.grid;
      cell.image = image.key;
    }
    end = last + 1;
  }
}

int64_t Prompt::common_prefix(const Prompt& other) const {
  const auto differ = std::mismatch(cells_.begin(), cells_.end(), other.cells_.begin(), other.cells_.end());
  return differ.first - cells_.begin();
}

}  // namespace qwen2vl
