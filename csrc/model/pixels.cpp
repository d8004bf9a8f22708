#include "model/pixels.h"

#include <algorithm>

namespace qwen2vl {

std::vector<float> pixel_values(const uint8_t* pixels, const float* levels, const GridTHW& grid,
                                const VisionConfig& config) {
  const int64_t side = config.patch_size, channels = config.in_channels, plane = side * side;
  const int64_t row_bytes = grid.w * side * channels;
  std::vector<float> values(grid.h * grid.w * config.patch_dim());
  float* out = values.data();
  for (const auto& [row, column] : patch_positions(grid, config.spatial_merge_size))
    for (int64_t channel = 0; channel < channels; ++channel) {
      const float* level = levels + channel * 256;
      for (int64_t y = 0; y < side; ++y) {
        const uint8_t* from = pixels + (row * side + y) * row_bytes + column * side * channels + channel;
        for (int64_t x = 0; x < side; ++x) out[y * side + x] = level[from[x * channels]];
      }
      for (int64_t frame = 1; frame < config.temporal_patch_size; ++frame)
        std::copy_n(out, plane, out + frame * plane);
      out += config.temporal_patch_size * plane;
    }
  return values;
}

}  // namespace qwen2vl
