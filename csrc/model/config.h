#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>

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
  float rms_norm_eps = 0;
  float rope_theta = 0;
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
  int64_t head_dim = 0;
  int64_t intermediate_size = 0;
  int64_t hidden_size = 0;  ///< of the merger's output: the language model's
  int64_t patch_size = 0;
  int64_t temporal_patch_size = 0;
  int64_t spatial_merge_size = 0;
  int64_t in_channels = 0;
  float layer_norm_eps = 0;

  int64_t patch_dim() const { return in_channels * temporal_patch_size * patch_size * patch_size; }
  int64_t merge_unit() const { return spatial_merge_size * spatial_merge_size; }
};

struct ModelConfig {
  TextConfig text;
  std::optional<VisionConfig> vision;  ///< absent in a file with the language model alone
};

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
