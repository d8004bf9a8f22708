#include "model/positions.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace qwen2vl {

int64_t vision_cells(const GridTHW& grid, const VisionConfig& config) {
  const int64_t merge = config.spatial_merge_size;
  const bool positive = grid.t >= 1 && grid.h >= 1 && grid.w >= 1;
  const bool bounded = positive && grid.t <= kMostPatches && grid.h <= kMostPatches / grid.t &&
                       grid.w <= kMostPatches / (grid.t * grid.h);
  if (!bounded || grid.h % merge != 0 || grid.w % merge != 0)
    throw std::invalid_argument("grid_thw: expected positive sizes with h and w multiples of " +
                                std::to_string(merge) + " and at most 2^24 patches, found (" +
                                std::to_string(grid.t) + ", " + std::to_string(grid.h) + ", " +
                                std::to_string(grid.w) + ")");
  return grid.t * grid.h * grid.w / (merge * merge);
}

std::vector<std::array<int32_t, 2>> patch_positions(const GridTHW& grid, int64_t merge) {
  std::vector<std::array<int32_t, 2>> positions;
  positions.reserve(grid.h * grid.w);
  for (int64_t row = 0; row < grid.h; row += merge)
    for (int64_t col = 0; col < grid.w; col += merge)
      for (int64_t i = 0; i < merge; ++i)
        for (int64_t j = 0; j < merge; ++j)
          positions.push_back({static_cast<int32_t>(row + i), static_cast<int32_t>(col + j)});
  return positions;
}

std::vector<Position> mrope_positions(std::span<const int32_t> token_ids, std::span<const GridTHW> grids,
                                      const ModelConfig& config) {
  const TextConfig& text = config.text;
  const auto is_pad = [&](int32_t id) {
    return id >= 0 && (id == text.image_token_id || id == text.video_token_id);
  };
  std::vector<Position> positions;
  positions.reserve(token_ids.size());
  int32_t next = 0;
  size_t item = 0;
  for (size_t i = 0; i < token_ids.size();) {
    if (!is_pad(token_ids[i])) {
      positions.push_back({next, next, next});
      ++next, ++i;
      continue;
    }
    if (item == grids.size())
      throw std::invalid_argument("token " + std::to_string(i) + " starts run " + std::to_string(item + 1) +
                                  " of vision pad tokens, but only " + std::to_string(grids.size()) +
                                  " grid(s) were given");
    if (!config.vision) throw std::invalid_argument("vision pad tokens, but the model has no vision tower");
    const GridTHW& grid = grids[item];
    const int64_t cells = vision_cells(grid, *config.vision);
    int64_t run = 0;
    while (i + run < token_ids.size() && run < cells && token_ids[i + run] == token_ids[i]) ++run;
    if (run < cells)
      throw std::invalid_argument("vision item " + std::to_string(item) + ": expected " +
                                  std::to_string(cells) + " pad tokens, found " + std::to_string(run));
    const int64_t h = grid.h / config.vision->spatial_merge_size;
    const int64_t w = grid.w / config.vision->spatial_merge_size;
    for (int64_t t = 0; t < grid.t; ++t)
      for (int64_t row = 0; row < h; ++row)
        for (int64_t col = 0; col < w; ++col)
          positions.push_back({static_cast<int32_t>(next + t), static_cast<int32_t>(next + row),
                               static_cast<int32_t>(next + col)});
    next += static_cast<int32_t>(std::max({grid.t, h, w}));
    i += cells;
    ++item;
  }
  if (item != grids.size())
    throw std::invalid_argument("expected " + std::to_string(grids.size()) +
                                " run(s) of vision pad tokens, found " + std::to_string(item));
  return positions;
}

}  // namespace qwen2vl
