#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "model/config.h"

namespace qwen2vl {

/// Of an image or video, far above any context.
inline constexpr int64_t kMostPatches = int64_t{1} << 24;

/// Size of an image or video in patches: frames / temporal_patch_size, height / patch_size, width /
/// patch_size.
struct GridTHW {
  int64_t t = 1, h = 0, w = 0;
  bool operator==(const GridTHW&) const = default;
};

/// M-RoPE indices of one cell: time, row, column.
using Position = std::array<int32_t, 3>;

/// Checks a grid against the tower (each side positive and a multiple of the merge size, at most 2^24
/// patches) and returns the number of cells it takes: t * h * w / merge^2. Throws std::invalid_argument.
int64_t vision_cells(const GridTHW& grid, const VisionConfig& config);

/// Row and column of a patch by its place among the rows of pixel_values of one temporal step:
/// (h / merge, w / merge, merge, merge).
std::array<int32_t, 2> patch_position(const GridTHW& grid, int64_t spatial_merge_size, int64_t patch);

/// An image or video among tokens: its pad tokens are the cells [start, end).
struct VisionItem {
  GridTHW grid;
  int64_t start = 0, end = 0;
};

/// The items of the runs of image or video pad tokens, in order. Throws std::invalid_argument where runs and
/// grids do not fit each other.
std::vector<VisionItem> find_items(std::span<const int32_t> token_ids, std::span<const GridTHW> grids,
                                   const ModelConfig& config);

/// Qwen2-VL's rope index (the original rule of the model's authors, see Qwen2VLModel.get_rope_index) of `n`
/// tokens: text counts up by one in all three; an image or video at position p gives its merged grid p + (t,
/// row, column); the text after it goes on at 1 + the largest index used.
std::vector<Position> mrope_positions(int64_t n, std::span<const VisionItem> items,
                                      int64_t spatial_merge_size);

}  // namespace qwen2vl
