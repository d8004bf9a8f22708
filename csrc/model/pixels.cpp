#include "model/pixels.h"

#include <algorithm>

namespace qwen2vl {

void pixel_values(const uint8_t* pixels, const float* levels, const GridTHW& grid, const VisionConfig& config,
                  int64_t row, int64_t n, float* out) {
  const int64_t side = config.patch_size, channels = config.in_channels, plane = side * side;
  const int64_t row_bytes = grid.w * side * channels;
  for (int64_t patch = row; patch < row + n; ++patch) {
    const auto [down, across] = patch_position(grid, config.spatial_merge_size, patch);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const float* level = levels + channel * 256;
      for (int64_t y = 0; y < side; ++y) {
        const uint8_t* from = pixels + (down * side + y) * row_bytes + across * side * channels + channel;
        for (int64_t x = 0; x < side; ++x) out[y * side + x] = level[from[x * channels]];
      }
      for (int64_t frame = 1; frame < config.temporal_patch_size; ++frame)
        std::copy_n(out, plane, out + frame * plane);
      out += config.temporal_patch_size * plane;
    }
  }
}

}  // namespace qwen2vl
