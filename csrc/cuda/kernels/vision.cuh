#pragma once

// What the vision tower needs beside products, norms and attention.

#include "cuda/chip.h"

namespace qwen2vl::cuda {

/// Row and column of a patch within its temporal step. Rows are in the order of pixel_values: (h / merge, w /
/// merge, merge, merge).
CHIP_DEVICE int2 patch_position(int within, int grid_w, int merge) {
  const int unit = merge * merge, across = grid_w / merge, cell = within / unit, inner = within % unit;
  return make_int2(cell / across * merge + inner / merge, cell % across * merge + inner % merge);
}

struct PixelRows {
  const uint8_t* pixels;  ///< [grid_h side][grid_w side][channels]
  const float* levels;    ///< [channels][256]: what a byte becomes
  int32_t grid_w, merge, side, channels, frames;
  int64_t stride;
  uint16_t* half_out;  ///< bf16 [patches][stride], or
  float* out;          ///< float32
};

/// A block a patch. Values in the order channel, frame, row, column; a still repeats its frame.
CHIP_KERNEL void CHIP_BOUNDS(256, 4) pixel_rows(PixelRows p) {
  const int plane = p.side * p.side, row_bytes = p.grid_w * p.side * p.channels;
  const int2 at = patch_position(static_cast<int>(blockIdx.x), p.grid_w, p.merge);
  for (int i = static_cast<int>(threadIdx.x); i < p.channels * p.frames * plane;
       i += static_cast<int>(blockDim.x)) {
    const int channel = i / (p.frames * plane), y = i % plane / p.side, x = i % p.side;
    const uint8_t byte = p.pixels[static_cast<int64_t>(at.x * p.side + y) * row_bytes +
                                  (at.y * p.side + x) * p.channels + channel];
    const float value = p.levels[channel * 256 + byte];
    const int64_t to = static_cast<int64_t>(blockIdx.x) * p.stride + i;
    if (p.out != nullptr)
      p.out[to] = value;
    else
      p.half_out[to] = static_cast<uint16_t>(pack_bf16(value, 0.0f));
  }
}

struct VisionRotation {
  int32_t grid_h, grid_w, merge;
  int32_t quarter;  ///< head_dim / 4 frequencies turn with the row, the same with the column
  const float* inv_freq;
  float* out;  ///< [rows][cos: 2 quarter | sin: 2 quarter]
  int64_t rows;
};

/// A thread a row and frequency; the same in every temporal step (VisionRotaryEmbedding).
CHIP_KERNEL void CHIP_BOUNDS(256, 4) vision_rotation(VisionRotation p) {
  const int half = 2 * p.quarter;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.rows * half) return;
  const int64_t row = i / half;
  const int within = static_cast<int>(row % (static_cast<int64_t>(p.grid_h) * p.grid_w));
  const int frequency = static_cast<int>(i % half);
  const int2 at = patch_position(within, p.grid_w, p.merge);
  const int position = frequency < p.quarter ? at.x : at.y;
  const float angle = static_cast<float>(position) * p.inv_freq[frequency % p.quarter];
  p.out[row * 2 * half + frequency] = cosf(angle);
  p.out[row * 2 * half + half + frequency] = sinf(angle);
}

}  // namespace qwen2vl::cuda
