#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "model/positions.h"

namespace qwen2vl {

/// A still's pixels [h * patch_size, w * patch_size, in_channels] as pixel_values [h * w, patch_dim]: values
/// in the order channel, frame, row, column, a byte b of a channel as levels[channel][b], the frame repeated.
std::vector<float> pixel_values(const uint8_t* pixels, const float* levels, const GridTHW& grid,
                                const VisionConfig& config);

}  // namespace qwen2vl
