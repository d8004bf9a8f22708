#include "engine/plugin_model.h"

#include <algorithm>
#include <iterator>

namespace qwen2vl {
namespace {

qwen2vl_vector to_c(const Vector& v) { return {v.data(), static_cast<int64_t>(v.size())}; }

qwen2vl_norm to_c(const NormWeights& w) { return {to_c(w.weight), to_c(w.bias)}; }

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
  for (const auto& file : weights.files)
    for (const auto& part : file->parts())
      mappings_.emplace(&part->input, std::make_unique<MappedFile>(part->input));
  for (const DecoderLayerWeights& layer : weights.text.layers) layers_.push_back(decoder_layer(layer));
  model_.text = to_c(config.text);
  model_.text.embed_tokens = matrix(weights.text.embed_tokens);
  model_.text.layers = layers_.data();
  model_.text.norm = to_c(weights.text.norm);
  if (weights.text.lm_head) model_.text.lm_head = matrix(*weights.text.lm_head);
  if (!config.vision) return;

  const VisionWeights& tower = *weights.vision;
  for (const VisionBlockWeights& block : tower.blocks) blocks_.push_back(vision_block(block));
  vision_ = to_c(*config.vision);
  for (size_t frame = 0; frame < std::size(tower.patch_embed); ++frame)
    vision_.patch_embed[frame] = matrix(tower.patch_embed[frame]);
  vision_.blocks = blocks_.data();
  vision_.ln_q = to_c(tower.ln_q);
  vision_.mlp_0 = linear(tower.mlp_0);
  vision_.mlp_2 = linear(tower.mlp_2);
  model_.vision = &vision_;
}

void PluginModel::release_pages() const {
  for (const auto& [file, mapping] : mappings_) mapping->release();
}

qwen2vl_matrix PluginModel::matrix(const MatrixView& m) const {
  return {static_cast<uint32_t>(m.type), m.rows, m.cols, mappings_.at(m.file)->bytes().data() + m.offset};
}

qwen2vl_linear PluginModel::linear(const LinearWeights& w) const { return {matrix(w.weight), to_c(w.bias)}; }

qwen2vl_decoder_layer PluginModel::decoder_layer(const DecoderLayerWeights& w) const {
  qwen2vl_decoder_layer layer{};
  layer.input_layernorm = to_c(w.input_layernorm);
  layer.q_proj = linear(w.q_proj);
  layer.k_proj = linear(w.k_proj);
  layer.v_proj = linear(w.v_proj);
  layer.o_proj = linear(w.o_proj);
  layer.post_attention_layernorm = to_c(w.post_attention_layernorm);
  layer.gate_proj = linear(w.gate_proj);
  layer.up_proj = linear(w.up_proj);
  layer.down_proj = linear(w.down_proj);
  return layer;
}

qwen2vl_vision_block PluginModel::vision_block(const VisionBlockWeights& w) const {
  qwen2vl_vision_block block{};
  block.norm1 = to_c(w.norm1);
  block.q = linear(w.q);
  block.k = linear(w.k);
  block.v = linear(w.v);
  block.proj = linear(w.proj);
  block.norm2 = to_c(w.norm2);
  block.fc1 = linear(w.fc1);
  block.fc2 = linear(w.fc2);
  return block;
}

}  // namespace qwen2vl
