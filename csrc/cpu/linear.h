#pragma once

#include "cpu/linear_input.h"

namespace qwen2vl::cpu {

/// Of the mean of the rows, which then serves any rows; empty where they do not go through
/// KernelTable::matmul_groups.
Center center_of(Context& ctx, const PackedLinear& layer, const InputRows& x);

/// out[m][n] (=, +=) x[m] . (weight[n] + update[n]) + bias[n] for every row and output feature.
void linear(Context& ctx, const PackedLinear& layer, const InputRows& x, float* out, int64_t out_stride,
            Store store, const Center& center = {});

/// out[m][n] = silu(x[m] . gate[n]) * (x[m] . up[n]), out [rows][features]; the layer's two parts are gate
/// and up (SwiGLU, arXiv 2002.05202), each multiplied where it is still in cache. Returns `out`, as the next
/// layer's input.
InputRows linear_swiglu(Context& ctx, const PackedLinear& gate_up, const InputRows& x, float* out);

}  // namespace qwen2vl::cpu
