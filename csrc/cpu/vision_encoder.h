#pragma once

#include <vector>

#include "base/pieces.h"
#include "cpu/full_attention.h"
#include "cpu/linear.h"
#include "model/weights.h"

namespace qwen2vl::cpu {

/// Qwen2VisionTransformerPretrainedModel's forward pass.
class VisionEncoder {
 public:
  explicit VisionEncoder(const VisionConfig& config) : config_(config) {}

  /// Repacks a block's weights, the last time those around the blocks; true once all are there.
  bool pack_next(const VisionWeights& weights, Context& ctx);
  /// Once they are: input -> out [t*h*w / merge_unit, hidden_size]. Yields the blocks that are done. The
  /// encoder, the context, `out` and what `input` points at outlive it.
  Pieces operator()(Context& ctx, VisionInput input, float* out) const;

  int64_t weight_bytes() const;

 private:
  struct CenteredLinear;
  struct Buffers;
  struct Block {
    NormWeights norm1, norm2;
    PackedLinear qkv, proj, fc1, fc2;
  };

  void embed(Context& ctx, const VisionInput& input, int64_t row, int64_t n, Buffers& b) const;
  Rotation rotation(const GridTHW& grid) const;  ///< of every patch of a time step
  void mlp(Context& ctx, const NormWeights& norm2, CenteredLinear& fc1, CenteredLinear& fc2, float* x,
           int64_t rows, Buffers& b) const;
  void merge(Context& ctx, int64_t row, int64_t n, Buffers& b, float* out) const;

  VisionConfig config_;
  PackedLinear patch_embed_;  // [embed_dim, patch_dim]
  std::vector<Block> blocks_;
  NormWeights ln_q_;
  PackedLinear mlp_0_, mlp_2_;
};

}  // namespace qwen2vl::cpu
