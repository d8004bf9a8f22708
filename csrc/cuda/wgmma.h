#pragma once

#include "cuda/context.h"
#include "cuda/kernels/flash_attention.cuh"
#include "cuda/kernels/many_rows.cuh"

namespace qwen2vl::cuda {

// Twins of the portable kernels with the instructions that Hopper alone has (wgmma, bulk tensor copies). Each
// returns false where this build or this shape has no such kernel: then the portable one computes it.

/// The product of many_rows.cuh.
bool wgmma_rows(Context& ctx, const char* name, const ManyRows& p, Finish finish);

/// flash_attention.cuh over contiguous keys, all of them seen, head_dim 80.
bool wgmma_attention(Context& ctx, const FlashAttention& p, int64_t head_dim, int64_t heads, int64_t steps);

/// Operations a second of bf16 products that touch no memory; 0 where this build or chip has no wgmma.
double wgmma_peak(Context& ctx, double seconds);

}  // namespace qwen2vl::cuda
