#include "model/architecture.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "base/error.h"

namespace qwen2vl {
namespace {

struct Known {
  std::string_view key;   ///< as the file has it
  std::string_view name;  ///< as people do
};

// What is met beside Qwen2-VL; others are called by their key alone.
constexpr Known kArchitectures[] = {
    {"gemma3", "Gemma 3"},
    {"llama", "Llama, or what a LLaVA or MiniCPM-V is built on"},
    {"mllama", "Llama 3.2 Vision"},
    {"qwen2", "Qwen2 or Qwen2.5, without vision"},
    {"qwen3", "Qwen3, without vision"},
    {"qwen35", "Qwen3.5"},
    {"qwen3vl", "Qwen3-VL"},
    {"qwen3vlmoe", "Qwen3-VL"},
};
constexpr Known kProjectors[] = {
    {"gemma3", "Gemma 3"},          {"idefics3", "SmolVLM"},
    {"internvl", "InternVL"},       {"ldp", "MobileVLM"},
    {"ldpv2", "MobileVLM"},         {"mlp", "LLaVA"},
    {"mlp_norm", "LLaVA"},          {"pixtral", "Pixtral"},
    {"qwen2.5o", "Qwen2.5-Omni"},   {"qwen2.5vl_merger", "Qwen2.5-VL"},
    {"qwen3vl_merger", "Qwen3-VL"}, {"resampler", "MiniCPM-V"},
};

/// "'qwen3vl' (Qwen3-VL)".
template <size_t N>
std::string described(const Known (&known)[N], std::string_view key) {
  const auto* found =
      std::find_if(std::begin(known), std::end(known), [&](const Known& k) { return k.key == key; });
  std::string text = "'" + printable(key) + "'";
  return found == std::end(known) ? text : text + " (" + std::string(found->name) + ")";
}

bool has_token(const gguf::File& file, std::string_view token) {
  const gguf::Value* value = file.find("tokenizer.ggml.tokens");
  const auto* array = value == nullptr ? nullptr : std::get_if<gguf::Array>(value);
  const auto* tokens = array == nullptr ? nullptr : std::get_if<std::vector<std::string_view>>(array);
  return tokens != nullptr && std::find(tokens->begin(), tokens->end(), token) != tokens->end();
}

/// The file's projector: the first files of this model said it by a flag of its own.
std::string_view projector(const gguf::File& file) {
  const bool merger = file.get_bool("clip.has_qwen2vl_merger", false);
  const bool llava = file.get_bool("clip.has_llava_projector", false);
  return file.get_string("clip.projector_type", merger ? "qwen2vl_merger" : llava ? "mlp" : "");
}

const gguf::Tensor& need_matrix(const gguf::File& file, std::string_view name) {
  const gguf::Tensor* tensor = file.find_tensor(name);
  if (tensor != nullptr && tensor->shape.size() == 2) return *tensor;
  throw FormatError(file.path() + ": tensor '" + std::string(name) + "'" +
                    (tensor == nullptr
                         ? " is missing"
                         : ": expected 2 dimensions, found " + std::to_string(tensor->shape.size())));
}

}  // namespace

void require_language_model(const gguf::File& file) {
  const std::string_view architecture = file.get_string("general.architecture", "");
  if (architecture == "clip")
    throw UnsupportedError(file.path() +
                           ": expected a language model, found a vision tower alone: pass it as mmproj, "
                           "beside its language model");
  if (architecture != "qwen2vl")
    throw UnsupportedError(file.path() + ": expected the architecture 'qwen2vl', found " +
                           described(kArchitectures, architecture));
  // Qwen2.5-VL's files have the same architecture and sizes; its vocabulary goes on where Qwen2-VL's ends.
  if (has_token(file, "<|fim_prefix|>"))
    throw UnsupportedError(file.path() +
                           ": expected Qwen2-VL, found Qwen2.5-VL (its vocabulary has '<|fim_prefix|>')");
}

bool has_vision_tower(const gguf::File& file) {
  return !projector(file).empty() || file.get_bool("clip.has_vision_encoder", false);
}

void require_vision_tower(const gguf::File& file) {
  if (!has_vision_tower(file))
    throw FormatError(file.path() +
                      ": expected a vision tower (key 'clip.projector_type'), found architecture '" +
                      printable(file.get_string("general.architecture", "")) + "'");
  std::string_view found = projector(file);
  // The first files of Qwen2.5-VL's tower have Qwen2-VL's key, and gates that it has not.
  if (found == "qwen2vl_merger" && file.find_tensor("v.blk.0.ffn_gate.weight") != nullptr)
    found = "qwen2.5vl_merger";
  if (found != "qwen2vl_merger")
    throw UnsupportedError(file.path() + ": key 'clip.projector_type': expected 'qwen2vl_merger', found " +
                           described(kProjectors, found));
}

int64_t vision_tower_width(const gguf::File& file) { return need_matrix(file, "mm.2.weight").shape[0]; }

bool has_swapped_feed_forward(const gguf::File& file) {
  const std::vector<int64_t>& up = need_matrix(file, "v.blk.0.ffn_up.weight").shape;
  const int64_t embed_dim = file.get_int("clip.vision.embedding_length");
  return up[0] == embed_dim && up[1] != embed_dim;
}

}  // namespace qwen2vl
