#pragma once

#include <vector>

#include "cpu/full_attention.h"
#include "cpu/linear.h"
#include "model/weights.h"

namespace qwen2vl::cpu {

/// Qwen2VisionTransformerPretrainedModel's forward pass.
class VisionEncoder {
 public:
  VisionEncoder(const VisionConfig& config, const VisionWeights& weights, Context& ctx,
                const Progress& progress);

  /// pixel_values [t*h*w, patch_dim] -> out [t*h*w / merge_unit, hidden_size].
  void operator()(Context& ctx, const float* pixel_values, const GridTHW& grid, float* out,
                  const Progress& progress);

  int64_t weight_bytes() const;

 private:
  struct CenteredLinear;
  struct Block {
    NormWeights norm1, norm2;
    PackedLinear qkv, proj, fc1, fc2;
  };

  Rotation rotation(const GridTHW& grid) const;  ///< of every patch of a time step
  void mlp(Context& ctx, const NormWeights& norm2, CenteredLinear& fc1, CenteredLinear& fc2, float* x,
           int64_t rows);
  void merge(Context& ctx, const float* x, int64_t rows, float* out);

  VisionConfig config_;
  PackedLinear patch_embed_;  // [embed_dim, patch_dim]
  std::vector<Block> blocks_;
  NormWeights ln_q_;
  PackedLinear mlp_0_, mlp_2_;

  FullAttention attention_;
  FloatBuffer x_;       // [patches][embed_dim], the residual stream
  FloatBuffer qkv_;     // [patches][3 embed_dim]
  FloatBuffer normed_;  // [kRows][embed_dim]
  FloatBuffer wide_;    // [kRows][intermediate_size]
};

}  // namespace qwen2vl::cpu
