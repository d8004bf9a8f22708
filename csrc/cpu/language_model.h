#pragma once

#include <vector>

#include "cpu/causal_attention.h"
#include "cpu/linear.h"
#include "model/weights.h"

namespace qwen2vl::cpu {

/// Qwen2VLTextModel's forward pass with M-RoPE and the head.
class LanguageModel {
 public:
  LanguageModel(const TextConfig& config, const TextWeights& weights, Context& ctx, const Progress& progress);

  /// See Backend::forward. The pages are pages()'s.
  void operator()(Context& ctx, std::span<const SequenceRows> batch, float* logits, const Progress& progress);

  PageStore& pages() { return pages_; }
  int64_t weight_bytes() const;
  /// Gives back what the last batch needed; the next one takes it anew.
  void release_buffers();
  int64_t read_weights(Context& ctx);  ///< Backend::read_weights

 private:
  struct Layer {
    NormWeights input_layernorm, post_attention_layernorm;
    PackedLinear qkv_proj, o_proj, gate_up_proj, down_proj;
  };

  const PackedLinear& head_weights() const { return lm_head_.parts.empty() ? embed_tokens_ : lm_head_; }
  void embedding(int32_t token, float* out) const;  ///< [hidden]
  void embed_tokens(Context& ctx, std::span<const SequenceRows> batch, std::span<const CausalRows> sequences);
  void attention(Context& ctx, const Layer& layer, int64_t index, std::span<const CausalRows> sequences);
  void rotate_and_store(Context& ctx, int64_t index, std::span<const CausalRows> sequences);
  void mlp(Context& ctx, const Layer& layer);
  void head(Context& ctx, std::span<const SequenceRows> batch, std::span<const CausalRows> sequences,
            float* logits);

  TextConfig config_;
  PackedLinear embed_tokens_;
  LowRankUpdate embed_tokens_update_;
  std::vector<Layer> layers_;
  NormWeights norm_;
  PackedLinear lm_head_;  // no parts where tied: embed_tokens_ is the head
  Vector inv_freq_;       // [head_dim / 2]

  KvPages pages_;
  CausalAttention attention_;
  int64_t rows_ = 0;     // of the batch at work
  int64_t decoded_ = 0;  // of them, the first
  FloatBuffer x_;        // [rows][hidden], the residual stream
  FloatBuffer normed_;   // [rows][hidden]
  FloatBuffer qkv_;      // [rows][q | k | v]
  FloatBuffer wide_;     // [rows][intermediate]
  FloatBuffer rope_;     // [rows][cos: head_dim / 2 | sin: head_dim / 2]
};

}  // namespace qwen2vl::cpu
