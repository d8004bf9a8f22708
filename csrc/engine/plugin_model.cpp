#include "engine/plugin_model.h"

#include <algorithm>
#include <iterator>

namespace qwen2vl {
namespace {

qwen2vl_matrix to_c(const MatrixView& m) { return {static_cast<uint32_t>(m.type), m.rows, m.cols, m.data}; }

qwen2vl_vector to_c(const Vector& v) { return {v.data(), static_cast<int64_t>(v.size())}; }

qwen2vl_linear to_c(const LinearWeights& w) { return {to_c(w.weight), to_c(w.bias)}; }

qwen2vl_norm to_c(const NormWeights& w) { return {to_c(w.weight), to_c(w.bias)}; }

qwen2vl_decoder_layer to_c(const DecoderLayerWeights& w) {
  qwen2vl_decoder_layer layer{};
  layer.input_layernorm = to_c(w.input_layernorm);
  layer.q_proj = to_c(w.q_proj);
  layer.k_proj = to_c(w.k_proj);
  layer.v_proj = to_c(w.v_proj);
  layer.o_proj = to_c(w.o_proj);
  layer.post_attention_layernorm = to_c(w.post_attention_layernorm);
  layer.gate_proj = to_c(w.gate_proj);
  layer.up_proj = to_c(w.up_proj);
  layer.down_proj = to_c(w.down_proj);
  return layer;
}

qwen2vl_vision_block to_c(const VisionBlockWeights& w) {
  qwen2vl_vision_block block{};
  block.norm1 = to_c(w.norm1);
  block.q = to_c(w.q);
  block.k = to_c(w.k);
  block.v = to_c(w.v);
  block.proj = to_c(w.proj);
  block.norm2 = to_c(w.norm2);
  block.fc1 = to_c(w.fc1);
  block.fc2 = to_c(w.fc2);
  return block;
}

qwen2vl_text to_c(const TextConfig& c) {
  qwen2vl_text text{};
  text.hidden_size = c.hidden_size;
  text.intermediate_size = c.intermediate_size;
  text.num_hidden_layers = c.num_hidden_layers;
  text.num_attention_heads = c.num_attention_heads;
  text.num_key_value_heads = c.num_key_value_heads;
  text.head_dim = c.head_dim;
  text.vocab_size = c.vocab_size;
  text.max_position_embeddings = c.max_position_embeddings;
  text.rms_norm_eps = c.rms_norm_eps;
  text.rope_theta = c.rope_theta;
  std::copy(c.mrope_section.begin(), c.mrope_section.end(), text.mrope_section);
  return text;
}

qwen2vl_vision to_c(const VisionConfig& c) {
  qwen2vl_vision vision{};
  vision.embed_dim = c.embed_dim;
  vision.depth = c.depth;
  vision.num_heads = c.num_heads;
  vision.head_dim = c.head_dim;
  vision.intermediate_size = c.intermediate_size;
  vision.hidden_size = c.hidden_size;
  vision.patch_size = c.patch_size;
  vision.temporal_patch_size = c.temporal_patch_size;
  vision.spatial_merge_size = c.spatial_merge_size;
  vision.in_channels = c.in_channels;
  vision.layer_norm_eps = c.layer_norm_eps;
  return vision;
}

}  // namespace

PluginModel::PluginModel(const ModelConfig& config, const Weights& weights) {
  for (const DecoderLayerWeights& layer : weights.text.layers) layers_.push_back(to_c(layer));
  model_.text = to_c(config.text);
  model_.text.embed_tokens = to_c(weights.text.embed_tokens);
  model_.text.layers = layers_.data();
  model_.text.norm = to_c(weights.text.norm);
  if (weights.text.lm_head) model_.text.lm_head = to_c(*weights.text.lm_head);
  if (!config.vision) return;

  const VisionWeights& tower = *weights.vision;
  for (const VisionBlockWeights& block : tower.blocks) blocks_.push_back(to_c(block));
  vision_ = to_c(*config.vision);
  for (size_t frame = 0; frame < std::size(tower.patch_embed); ++frame)
    vision_.patch_embed[frame] = to_c(tower.patch_embed[frame]);
  vision_.blocks = blocks_.data();
  vision_.ln_q = to_c(tower.ln_q);
  vision_.mlp_0 = to_c(tower.mlp_0);
  vision_.mlp_2 = to_c(tower.mlp_2);
  model_.vision = &vision_;
}

}  // namespace qwen2vl
