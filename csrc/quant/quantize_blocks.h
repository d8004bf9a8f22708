#pragma once

#include "quant/block_types.h"

namespace qwen2vl {

// For the least weighted square error, sum(w * (x - x')^2), of finite values with weights above 0. Magnitudes
// beyond a format's are cut to it.

inline constexpr int kGroup = 4;  ///< blocks of 32 values that are searched side by side

/// The values and weights of four blocks.
struct BlockGroup {
  const float *x[kGroup], *w[kGroup];
};

void quantize_blocks(const BlockGroup& group, Block<DType::Q4_0>* out);
void quantize_blocks(const BlockGroup& group, Block<DType::Q4_1>* out);
void quantize_blocks(const BlockGroup& group, Block<DType::Q5_0>* out);
void quantize_blocks(const BlockGroup& group, Block<DType::Q5_1>* out);
void quantize_blocks(const BlockGroup& group, Block<DType::IQ4_NL>* out);

void quantize_block(const float* x, const float* w, Block<DType::Q2_K>* out);
void quantize_block(const float* x, const float* w, Block<DType::Q3_K>* out);
void quantize_block(const float* x, const float* w, Block<DType::Q4_K>* out);
void quantize_block(const float* x, const float* w, Block<DType::Q5_K>* out);
void quantize_block(const float* x, const float* w, Block<DType::Q6_K>* out);
void quantize_block(const float* x, const float* w, Block<DType::IQ4_XS>* out);

}  // namespace qwen2vl
