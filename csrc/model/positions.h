#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "model/config.h"

namespace qwen2vl {

/// Of a vision item, far above any context.
inline constexpr int64_t kMostPatches = int64_t{1} << 24;

/// Size of a vision item in patches: frames / temporal_patch_size, height / patch_size, width / patch_size.
struct GridTHW {
  int64_t t = 1, h = 0, w = 0;
  bool operator==(const GridTHW&) const = default;
};

/// M-RoPE indices of one cell: time, row, column.
using Position = std::array<int32_t, 3>;

/// Checks a grid against the tower (each side positive and a multiple of the merge size, at most 2^24
/// patches) and returns the number of cells it takes: t * h * w / merge^2. Throws std::invalid_argument.
int64_t vision_cells(const GridTHW& grid, const VisionConfig& config);

/// Row and column of every patch of one temporal step, in the order of the rows of pixel_values:
/// (h / merge, w / merge, merge, merge).
std::vector<std::array<int32_t, 2>> patch_positions(const GridTHW& grid, int64_t spatial_merge_size);

/// Qwen2-VL's rope index (the original rule of the model's authors, see Qwen2VLModel.get_rope_index): text
/// counts up by one in all three; a vision item at position p gives its merged grid p + (t, row, column); the
/// text after it goes on at 1 + the largest index used. `grids` in the order of the runs of image or video
/// pad tokens. Throws std::invalid_argument where runs and grids do not fit each other.
std::vector<Position> mrope_positions(std::span<const int32_t> token_ids, std::span<const GridTHW> grids,
                                      const ModelConfig& config);

}  // namespace qwen2vl
