#include "model/config.h"

#include <cmath>
#include <string>

#include "base/error.h"
#include "model/architecture.h"

namespace qwen2vl {
namespace {

// Far above any model of the family (72B: 29568 wide, 80 layers, 152064 rows), far below what overflows.
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxLayers = 1024;

std::string where(const gguf::File& file) { return file.path() + ": "; }

int64_t checked_size(const gguf::File& file, std::string_view key, int64_t low, int64_t high) {
  const int64_t value = file.get_int(key);
  if (value < low || value > high)
    throw FormatError(where(file) + "key '" + std::string(key) + "': expected " + std::to_string(low) + ".." +
                      std::to_string(high) + ", found " + std::to_string(value));
  return value;
}

float checked_epsilon(const gguf::File& file, std::string_view key, double fallback) {
  const double value = file.get_float(key, fallback);
  if (!(value > 0 && value < 1))
    throw FormatError(where(file) + "key '" + std::string(key) + "': expected a number in (0, 1), found " +
                      std::to_string(value));
  return static_cast<float>(value);
}

void require(bool ok, const gguf::File& file, const std::string& message) {
  if (!ok) throw FormatError(where(file) + message);
}

const gguf::Tensor& need_tensor(const gguf::File& file, std::string_view name, size_t dimensions) {
  const gguf::Tensor* tensor = file.find_tensor(name);
  require(tensor != nullptr, file, "tensor '" + std::string(name) + "' is missing");
  require(tensor->shape.size() == dimensions, file,
          "tensor '" + std::string(name) + "': expected " + std::to_string(dimensions) +
              " dimensions, found " + std::to_string(tensor->shape.size()));
  return *tensor;
}

TextConfig read_text_config(const gguf::File& file) {
  TextConfig c;
  c.hidden_size = checked_size(file, "qwen2vl.embedding_length", 1, kMaxWidth);
  c.intermediate_size = checked_size(file, "qwen2vl.feed_forward_length", 1, kMaxWidth);
  c.num_hidden_layers = checked_size(file, "qwen2vl.block_count", 1, kMaxLayers);
  c.num_attention_heads = checked_size(file, "qwen2vl.attention.head_count", 1, 4096);
  c.num_key_value_heads = checked_size(file, "qwen2vl.attention.head_count_kv", 1, 4096);
  c.max_position_embeddings = checked_size(file, "qwen2vl.context_length", 1, 1 << 24);
  c.rms_norm_eps = checked_epsilon(file, "qwen2vl.attention.layer_norm_rms_epsilon", 1e-6);
  require(c.num_attention_heads % c.num_key_value_heads == 0, file,
          "head_count " + std::to_string(c.num_attention_heads) + " is not a multiple of head_count_kv " +
              std::to_string(c.num_key_value_heads));

  if (file.find("qwen2vl.attention.key_length") != nullptr) {
    c.head_dim = checked_size(file, "qwen2vl.attention.key_length", 2, 4096);
  } else {
    require(c.hidden_size % c.num_attention_heads == 0, file,
            "embedding_length " + std::to_string(c.hidden_size) + " is not a multiple of head_count " +
                std::to_string(c.num_attention_heads));
    c.head_dim = c.hidden_size / c.num_attention_heads;
  }
  require(c.head_dim % 2 == 0, file, "head_dim " + std::to_string(c.head_dim) + " is odd");

  const double theta = file.get_float("qwen2vl.rope.freq_base", 1e6);
  require(theta > 0 && std::isfinite(theta), file, "key 'qwen2vl.rope.freq_base' is not a positive number");
  c.rope_theta = static_cast<float>(theta);

  const std::vector<int64_t> sections = file.get_ints("qwen2vl.rope.dimension_sections");
  require(sections.size() == 3 || sections.size() == 4, file,
          "key 'qwen2vl.rope.dimension_sections': expected 3 or 4 numbers, found " +
              std::to_string(sections.size()));
  int64_t total = 0;
  for (size_t i = 0; i < sections.size(); ++i) {
    require(sections[i] >= 0 && sections[i] <= c.head_dim && (i < 3 || sections[i] == 0), file,
            "key 'qwen2vl.rope.dimension_sections': " + std::to_string(sections[i]) + " is out of range");
    if (i < 3) c.mrope_section[i] = sections[i];
    total += sections[i];
  }
  require(total == c.head_dim / 2, file,
          "key 'qwen2vl.rope.dimension_sections' sums to " + std::to_string(total) +
              ", expected head_dim / 2 = " + std::to_string(c.head_dim / 2));

  c.vocab_size = need_tensor(file, "token_embd.weight", 2).shape[0];
  c.tie_word_embeddings = file.find_tensor("output.weight") == nullptr;

  if (const gguf::Value* value = file.find("tokenizer.ggml.tokens")) {
    const auto* array = std::get_if<gguf::Array>(value);
    const auto* tokens = array ? std::get_if<std::vector<std::string_view>>(array) : nullptr;
    require(tokens != nullptr, file, "key 'tokenizer.ggml.tokens' is not an array of strings");
    const auto n = static_cast<int64_t>(tokens->size());
    require(n <= c.vocab_size, file,
            "key 'tokenizer.ggml.tokens': expected at most " + std::to_string(c.vocab_size) +
                " tokens, the rows of token_embd.weight, found " + std::to_string(n));
    for (int64_t i = 0; i < n; ++i) {
      if ((*tokens)[i] == "<|image_pad|>") c.image_token_id = i;
      if ((*tokens)[i] == "<|video_pad|>") c.video_token_id = i;
    }
  }
  return c;
}

VisionConfig read_vision_config(const gguf::File& file, const TextConfig& text) {
  VisionConfig c;
  require_vision_tower(file);
  c.embed_dim = checked_size(file, "clip.vision.embedding_length", 1, kMaxWidth);
  c.depth = checked_size(file, "clip.vision.block_count", 1, kMaxLayers);
  c.num_heads = checked_size(file, "clip.vision.attention.head_count", 1, 4096);
  c.layer_norm_eps = checked_epsilon(file, "clip.vision.attention.layer_norm_epsilon", 1e-6);
  require(c.embed_dim % c.num_heads == 0, file,
          "clip.vision.embedding_length " + std::to_string(c.embed_dim) +
              " is not a multiple of head_count " + std::to_string(c.num_heads));
  c.head_dim = c.embed_dim / c.num_heads;
  require(c.head_dim % 4 == 0, file,
          "the vision tower's head_dim " + std::to_string(c.head_dim) + " is not a multiple of 4");

  // The file's own clip.vision.feed_forward_length is wrong in files made by llama.cpp: the shape counts.
  const bool swapped = has_swapped_feed_forward(file);
  c.intermediate_size = need_tensor(file, "v.blk.0.ffn_up.weight", 2).shape[swapped ? 1 : 0];

  // One slice [embed_dim, in_channels, patch, patch] per frame of the temporal patch.
  const gguf::Tensor& first = need_tensor(file, "v.patch_embd.weight", 4);
  const gguf::Tensor& second = need_tensor(file, "v.patch_embd.weight.1", 4);
  require(first.shape == second.shape, file, "v.patch_embd.weight and v.patch_embd.weight.1 differ in shape");
  c.temporal_patch_size = 2;
  c.in_channels = first.shape[1];
  c.patch_size = first.shape[2];
  require(
      first.shape[0] == c.embed_dim && first.shape[3] == c.patch_size && c.patch_size <= 1024 &&
          c.in_channels <= 64,
      file,
      "tensor 'v.patch_embd.weight': expected [" + std::to_string(c.embed_dim) + ", channels, patch, patch]");

  c.spatial_merge_size = file.get_int("clip.vision.spatial_merge_size", 2);
  require(
      c.spatial_merge_size >= 1 && c.spatial_merge_size <= 16, file,
      "key 'clip.vision.spatial_merge_size': expected 1..16, found " + std::to_string(c.spatial_merge_size));

  c.hidden_size = vision_tower_width(file);
  require(c.hidden_size == text.hidden_size, file,
          "another model's vision tower: it projects to " + std::to_string(c.hidden_size) +
              " features, the language model has " + std::to_string(text.hidden_size));
  return c;
}

}  // namespace

FoundTensor find_tensor(std::span<const gguf::File* const> files, std::string_view name) {
  for (const gguf::File* file : files)
    if (const gguf::Tensor* tensor = file->find_tensor(name)) return {file, tensor};
  return {};
}

ModelConfig read_config(std::span<const gguf::File* const> files) {
  if (files.empty()) throw std::invalid_argument("no model file");
  const gguf::File& text_file = *files[0];
  require_language_model(text_file);
  ModelConfig config;
  config.text = read_text_config(text_file);
  for (const gguf::File* file : files)
    if (has_vision_tower(*file)) {
      config.vision = read_vision_config(*file, config.text);
      break;
    }
  if (files.size() > 1 && !config.vision) require_vision_tower(*files[1]);
  return config;
}

}  // namespace qwen2vl
