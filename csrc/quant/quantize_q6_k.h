#pragma once

#include "quant/block_types.h"

namespace qwen2vl {

/// Quantizes 256 finite values. Magnitudes beyond the format's (about 2.7e8) are cut to it.
void quantize_q6_k(const float* x, Block<DType::Q6_K>* out);

}  // namespace qwen2vl
