#pragma once

#include <cstdint>

#include "model/config.h"
#include "model/positions.h"

namespace qwen2vl {

/// Rows [row, row + n) of a still's pixel_values [h * w, patch_dim], from its pixels [h * patch_size,
/// w * patch_size, in_channels] to `out` [n, patch_dim]: values in the order channel, frame, row, column, a
/// byte b of a channel as levels[channel][b], the frame repeated.
void pixel_values(const uint8_t* pixels, const float* levels, const GridTHW& grid, const VisionConfig& config,
                  int64_t row, int64_t n, float* out);

}  // namespace qwen2vl
