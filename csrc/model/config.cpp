#include "model/config.h"

#include <cstdio>
#include <string>

#include "base/error.h"
#include "model/architecture.h"

namespace qwen2vl {
namespace {

std::string where(const gguf::File& file) { return file.path() + ": "; }

std::string shown(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

/// The fields that have a key, checked; the others as they are.
struct KeyReader {
  const gguf::File& file;

  bool is_there(const ConfigKey& key) const {
    return !key.name.empty() && (key.required || file.find(key.name) != nullptr);
  }
  void operator()(const char*, int64_t& member, const ConfigKey& key) const {
    if (!is_there(key)) return;
    member = file.get_int(key.name);
    const auto least = static_cast<int64_t>(key.least), most = static_cast<int64_t>(key.most);
    if (member < least || member > most)
      throw FormatError(where(file) + "key '" + std::string(key.name) + "': expected " +
                        std::to_string(least) + ".." + std::to_string(most) + ", found " +
                        std::to_string(member));
  }
  void operator()(const char*, float& member, const ConfigKey& key) const {
    if (!is_there(key)) return;
    const double value = file.get_float(key.name);
    if (!(value > key.least && value < key.most))
      throw FormatError(where(file) + "key '" + std::string(key.name) + "': expected a number in (" +
                        shown(key.least) + ", " + shown(key.most) + "), found " + shown(value));
    member = static_cast<float>(value);
  }
  template <typename Other>
  void operator()(const char*, Other&, const ConfigKey&) const {}
};

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
  visit_fields(c, KeyReader{file});
  require(c.num_attention_heads % c.num_key_value_heads == 0, file,
          "head_count " + std::to_string(c.num_attention_heads) + " is not a multiple of head_count_kv " +
              std::to_string(c.num_key_value_heads));

  if (c.head_dim == 0) {
    require(c.hidden_size % c.num_attention_heads == 0, file,
            "embedding_length " + std::to_string(c.hidden_size) + " is not a multiple of head_count " +
                std::to_string(c.num_attention_heads));
    c.head_dim = c.hidden_size / c.num_attention_heads;
  }
  require(c.head_dim % 2 == 0, file, "head_dim " + std::to_string(c.head_dim) + " is odd");

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
  visit_fields(c, KeyReader{file});
  require(c.embed_dim % c.num_heads == 0, file,
          "clip.vision.embedding_length " + std::to_string(c.embed_dim) +
              " is not a multiple of head_count " + std::to_string(c.num_heads));
  c.head_dim = c.embed_dim / c.num_heads;
  require(c.head_dim % 4 == 0, file,
          "the vision tower's head_dim " + std::to_string(c.head_dim) + " is not a multiple of 4");

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
