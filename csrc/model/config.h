#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>

#include "gguf/reader.h"

namespace qwen2vl {

/// Qwen2's decoder; field names are those of transformers' Qwen2VLTextConfig.
struct TextConfig {
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  float rope_theta = 1e6f;
  std::array<int64_t, 3> mrope_section{};  ///< frequencies turned by time, row, column; sums to head_dim / 2
  bool tie_word_embeddings = false;
  int64_t image_token_id = -1;  ///< <|image_pad|>; -1 where the vocabulary lacks it
  int64_t video_token_id = -1;  ///< <|video_pad|>; likewise

  int64_t q_size() const { return num_attention_heads * head_dim; }
  int64_t kv_size() const { return num_key_value_heads * head_dim; }
};

/// The vision tower; field names are those of transformers' Qwen2VLVisionConfig.
struct VisionConfig {
  int64_t embed_dim = 0;
  int64_t depth = 0;
  int64_t num_heads = 0;
  int64_t intermediate_size = 0;
  int64_t hidden_size = 0;  ///< of the merger's output: the language model's
  int64_t patch_size = 0;
  int64_t temporal_patch_size = 0;
  int64_t spatial_merge_size = 2;
  int64_t in_channels = 0;
  float layer_norm_eps = 1e-6f;
  int64_t head_dim = 0;  ///< embed_dim / num_heads, no field of its own

  int64_t patch_dim() const { return in_channels * temporal_patch_size * patch_size * patch_size; }
  int64_t merge_unit() const { return spatial_merge_size * spatial_merge_size; }
};

struct ModelConfig {
  TextConfig text;
  std::optional<VisionConfig> vision;  ///< absent in a file with the language model alone
};

/// Where a field's number stands in a GGUF file, and between what it lies: [least, most] of integers, the
/// open interval of others. Fields without a key come from other fields, tensors or the vocabulary.
struct ConfigKey {
  std::string_view name;
  double least = 0, most = 0;
  bool required = true;  ///< else the field keeps the value that it has
};

// Far above any model of the family (72B: 29568 wide, 80 layers, 64 heads, 152064 rows), far below what
// overflows.
inline constexpr double kMostWidth = 1 << 20, kMostLayers = 1024, kMostHeads = 4096, kMostHeadDim = 4096;
// M-RoPE's indices are 32-bit integers and exact in float32.
inline constexpr double kMostPositions = 1 << 24;

/// visit(name, member, key) for every field that users see: the one list of them.
template <typename Config, typename Visit>
  requires std::same_as<std::remove_const_t<Config>, TextConfig>
void visit_fields(Config& c, const Visit& visit) {
  constexpr double kMostFloat = std::numeric_limits<float>::max();
  visit("hidden_size", c.hidden_size, ConfigKey{"qwen2vl.embedding_length", 1, kMostWidth});
  visit("intermediate_size", c.intermediate_size, ConfigKey{"qwen2vl.feed_forward_length", 1, kMostWidth});
  visit("num_hidden_layers", c.num_hidden_layers, ConfigKey{"qwen2vl.block_count", 1, kMostLayers});
  visit("num_attention_heads", c.num_attention_heads,
        ConfigKey{"qwen2vl.attention.head_count", 1, kMostHeads});
  visit("num_key_value_heads", c.num_key_value_heads,
        ConfigKey{"qwen2vl.attention.head_count_kv", 1, kMostHeads});
  visit("head_dim", c.head_dim, ConfigKey{"qwen2vl.attention.key_length", 2, kMostHeadDim, false});
  visit("vocab_size", c.vocab_size, ConfigKey{});
  visit("rms_norm_eps", c.rms_norm_eps, ConfigKey{"qwen2vl.attention.layer_norm_rms_epsilon", 0, 1, false});
  visit("rope_theta", c.rope_theta, ConfigKey{"qwen2vl.rope.freq_base", 0, kMostFloat, false});
  visit("mrope_section", c.mrope_section, ConfigKey{});
  visit("max_position_embeddings", c.max_position_embeddings,
        ConfigKey{"qwen2vl.context_length", 1, kMostPositions});
  visit("tie_word_embeddings", c.tie_word_embeddings, ConfigKey{});
}

template <typename Config, typename Visit>
  requires std::same_as<std::remove_const_t<Config>, VisionConfig>
void visit_fields(Config& c, const Visit& visit) {
  visit("depth", c.depth, ConfigKey{"clip.vision.block_count", 1, kMostLayers});
  visit("embed_dim", c.embed_dim, ConfigKey{"clip.vision.embedding_length", 1, kMostWidth});
  visit("num_heads", c.num_heads, ConfigKey{"clip.vision.attention.head_count", 1, kMostHeads});
  // The key clip.vision.feed_forward_length is wrong in files made by llama.cpp: a tensor's shape counts.
  visit("intermediate_size", c.intermediate_size, ConfigKey{});
  visit("hidden_size", c.hidden_size, ConfigKey{});
  visit("patch_size", c.patch_size, ConfigKey{});
  visit("temporal_patch_size", c.temporal_patch_size, ConfigKey{});
  visit("spatial_merge_size", c.spatial_merge_size,
        ConfigKey{"clip.vision.spatial_merge_size", 1, 16, false});
  visit("in_channels", c.in_channels, ConfigKey{});
  visit("layer_norm_eps", c.layer_norm_eps,
        ConfigKey{"clip.vision.attention.layer_norm_epsilon", 0, 1, false});
}

template <typename Config, typename Visit>
  requires std::same_as<std::remove_const_t<Config>, ModelConfig>
void visit_fields(Config& c, const Visit& visit) {
  visit("text_config", c.text, ConfigKey{});
  visit("vision_config", c.vision, ConfigKey{});
  visit("image_token_id", c.text.image_token_id, ConfigKey{});
  visit("video_token_id", c.text.video_token_id, ConfigKey{});
}

/// Reads the configuration from the GGUF keys and tensor shapes of a model: one file with both halves, or the
/// language model's file followed by the vision tower's (mmproj). FormatError or UnsupportedError, naming
/// file and key, where the files are not a Qwen2-VL.
ModelConfig read_config(std::span<const gguf::File* const> files);

/// The first tensor named `name` in `files`, with its file; null pointers where there is none.
struct FoundTensor {
  const gguf::File* file = nullptr;
  const gguf::Tensor* tensor = nullptr;
};
FoundTensor find_tensor(std::span<const gguf::File* const> files, std::string_view name);

}  // namespace qwen2vl
