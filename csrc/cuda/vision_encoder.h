#pragma once

#include <vector>

#include "cuda/language_model.h"
#include "cuda/linear.h"

namespace qwen2vl::cuda {

struct Grid {
  int64_t t, h, w;
};

/// An image or a clip in the host's memory: the values of its patches [t h w][patch_dim], or a still's pixels
/// [h patch][w patch][channels] with what a byte of each channel becomes [channels][256].
struct VisionInput {
  Grid grid;
  const float* pixel_values = nullptr;
  const uint8_t* pixels = nullptr;
  const float* levels = nullptr;
};

/// Qwen2VisionTransformerPretrainedModel on one device; `exact` through the plain kernels.
class VisionEncoder {
 public:
  VisionEncoder(Context& ctx, const qwen2vl_vision& vision, bool exact, const Report& report);

  /// -> out [t h w / merge^2][hidden_size], in the host's memory.
  void operator()(const VisionInput& input, float* out, const Report& report);

 private:
  struct Block {
    const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
    PackedLinear qkv, proj, fc1, fc2;                           // fast
    StoredLinear q, k, v, stored_proj, stored_fc1, stored_fc2;  // exact
  };

  void upload(const VisionInput& input, uint16_t* half_out, float* out, int64_t stride);
  void encode(const VisionInput& input, const Report& report);
  void encode_plain(const VisionInput& input, const Report& report);
  void attend(const Grid& grid);
  void norm(const float* x, const float* weight, const float* bias, int64_t rows, uint16_t* half_out,
            float* out, int64_t stride);

  Context& ctx_;
  qwen2vl_vision vision_;
  bool exact_;
  int64_t padded_head_dim_ = 0;
  int64_t transposed_stride_ = 0;  // of the values, where attention wants them transposed
  PackedLinear patch_embed_, mlp_0_, mlp_2_;
  StoredLinear stored_patch_embed_, stored_mlp_0_, stored_mlp_2_;
  std::vector<Block> blocks_;
  const float *ln_q_weight_ = nullptr, *ln_q_bias_ = nullptr, *inv_freq_ = nullptr;

  // Given back after an image: a page of a document takes half a gigabyte.
  DeviceBuffer pixels_, x_, rotation_, normed_, qkv_, attended_, wide_, expanded_, out_;
};

}  // namespace qwen2vl::cuda
