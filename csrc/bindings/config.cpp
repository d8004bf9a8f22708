#include "model/config.h"

#include <optional>
#include <vector>

#include "bindings/bindings.h"
#include "model/architecture.h"

namespace qwen2vl::bindings {
namespace {

py::dict text_config(const TextConfig& c) {
  py::dict d;
  d["hidden_size"] = c.hidden_size;
  d["intermediate_size"] = c.intermediate_size;
  d["num_hidden_layers"] = c.num_hidden_layers;
  d["num_attention_heads"] = c.num_attention_heads;
  d["num_key_value_heads"] = c.num_key_value_heads;
  d["head_dim"] = c.head_dim;
  d["vocab_size"] = c.vocab_size;
  d["max_position_embeddings"] = c.max_position_embeddings;
  d["rms_norm_eps"] = c.rms_norm_eps;
  d["rope_theta"] = c.rope_theta;
  d["mrope_section"] = std::vector<int64_t>(c.mrope_section.begin(), c.mrope_section.end());
  d["tie_word_embeddings"] = c.tie_word_embeddings;
  return d;
}

py::object vision_config(const std::optional<VisionConfig>& config) {
  if (!config) return py::none();
  py::dict d;
  d["embed_dim"] = config->embed_dim;
  d["depth"] = config->depth;
  d["num_heads"] = config->num_heads;
  d["intermediate_size"] = config->intermediate_size;
  d["hidden_size"] = config->hidden_size;
  d["patch_size"] = config->patch_size;
  d["temporal_patch_size"] = config->temporal_patch_size;
  d["spatial_merge_size"] = config->spatial_merge_size;
  d["in_channels"] = config->in_channels;
  d["layer_norm_eps"] = config->layer_norm_eps;
  return d;
}

}  // namespace

py::dict config_dict(const ModelConfig& config) {
  py::dict d;
  d["text_config"] = text_config(config.text);
  d["vision_config"] = vision_config(config.vision);
  d["image_token_id"] = config.text.image_token_id;
  d["video_token_id"] = config.text.video_token_id;
  return d;
}

void register_config(py::module_& m) {
  m.def("require_language_model", &require_language_model, py::arg("file"));
  m.def("has_vision_tower", &has_vision_tower, py::arg("file"));
  m.def("require_vision_tower", &require_vision_tower, py::arg("file"));
  m.def("vision_tower_width", &vision_tower_width, py::arg("file"));
  m.def("has_swapped_feed_forward", &has_swapped_feed_forward, py::arg("file"));
}

}  // namespace qwen2vl::bindings
