#pragma once

// What the vision tower needs beside products, norms and attention.

#include "cuda/chip.h"

namespace qwen2vl::cuda {

struct VisionRotation {
  int32_t grid_h, grid_w, merge;
  int32_t quarter;  ///< head_dim / 4 frequencies turn with the row, the same with the column
  const float* inv_freq;
  float* out;  ///< [rows][cos: 2 quarter | sin: 2 quarter]
  int64_t rows;
};

/// A thread a row and frequency. Rows are in the order of pixel_values: (h / merge, w / merge, merge, merge), the same
/// in every temporal step (VisionRotaryEmbedding).
CHIP_KERNEL void CHIP_BOUNDS(256, 4) vision_rotation(VisionRotation p) {
  const int half = 2 * p.quarter;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.rows * half) return;
  const int64_t row = i / half;
  const int within = static_cast<int>(row % (static_cast<int64_t>(p.grid_h) * p.grid_w));
  const int frequency = static_cast<int>(i % half), unit = p.merge * p.merge, across = p.grid_w / p.merge;
  const int cell = within / unit, inner = within % unit;
  const int position = frequency < p.quarter ? cell / across * p.merge + inner / p.merge
                                             : cell % across * p.merge + inner % p.merge;
  const float angle = static_cast<float>(position) * p.inv_freq[frequency % p.quarter];
  p.out[row * 2 * half + frequency] = cosf(angle);
  p.out[row * 2 * half + half + frequency] = sinf(angle);
}

}  // namespace qwen2vl::cuda
