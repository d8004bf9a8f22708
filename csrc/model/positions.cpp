#include "model/positions.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace qwen2vl {
namespace {

/// "[4, 12]", the first of them at least.
std::string listed(std::span<const int64_t> counts) {
  constexpr size_t kMost = 32;
  std::string text = "[";
  for (size_t i = 0; i < counts.size() && i < kMost; ++i) text += (i ? ", " : "") + std::to_string(counts[i]);
  return text + (counts.size() > kMost ? ", ...]" : "]");
}

}  // namespace

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

std::array<int32_t, 2> patch_position(const GridTHW& grid, int64_t merge, int64_t patch) {
  const int64_t square = patch / (merge * merge), inside = patch % (merge * merge), across = grid.w / merge;
  return {static_cast<int32_t>(square / across * merge + inside / merge),
          static_cast<int32_t>(square % across * merge + inside % merge)};
}

std::vector<VisionItem> find_items(std::span<const int32_t> token_ids, std::span<const GridTHW> grids,
                                   const ModelConfig& config) {
  if (!grids.empty() && !config.vision) throw std::invalid_argument("this model has no vision tower");
  std::vector<int64_t> expected, found;
  for (const GridTHW& grid : grids) expected.push_back(vision_cells(grid, *config.vision));
  std::vector<VisionItem> items;
  const int64_t image_pad = config.text.image_token_id, video_pad = config.text.video_token_id;
  for (size_t i = 0, end; i < token_ids.size(); i = end) {
    const int32_t id = token_ids[i];
    end = i + 1;
    if (id != image_pad && id != video_pad) continue;
    while (end < token_ids.size() && token_ids[end] == id) ++end;
    found.push_back(static_cast<int64_t>(end - i));
    if (items.size() < grids.size())
      items.push_back({grids[items.size()], static_cast<int64_t>(i), static_cast<int64_t>(end)});
  }
  if (found != expected)
    throw std::invalid_argument("token_ids: expected runs of <|image_pad|> (" + std::to_string(image_pad) +
                                ") of " + listed(expected) + " tokens, one an image, found " + listed(found));
  return items;
}

std::vector<Position> mrope_positions(int64_t n, std::span<const VisionItem> items, int64_t merge) {
  std::vector<Position> positions;
  positions.reserve(n);
  int32_t next = 0;
  const auto add_text = [&](int64_t end) {
    for (; std::ssize(positions) < end; ++next) positions.push_back({next, next, next});
  };
  for (const VisionItem& item : items) {
    add_text(item.start);
    const int64_t h = item.grid.h / merge, w = item.grid.w / merge;
    for (int64_t t = 0; t < item.grid.t; ++t)
      for (int64_t row = 0; row < h; ++row)
        for (int64_t col = 0; col < w; ++col)
          positions.push_back({static_cast<int32_t>(next + t), static_cast<int32_t>(next + row),
                               static_cast<int32_t>(next + col)});
    next += static_cast<int32_t>(std::max({item.grid.t, h, w}));
  }
  add_text(n);
  return positions;
}

}  // namespace qwen2vl
