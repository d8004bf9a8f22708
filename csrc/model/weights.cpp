#include "model/weights.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/printable.h"
#include "gguf/types.h"
#include "model/architecture.h"
#include "quant/quantize.h"

namespace qwen2vl {
namespace {

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

/// Looks tensors up and collects every complaint, so that a user sees all of them at once.
class Loader {
 public:
  Loader(std::span<const gguf::File* const> files, LowRankUpdates updates)
      : files_(files), updates_(std::move(updates)) {}

  MatrixView matrix(const std::string& name, int64_t rows, int64_t cols) {
    return view(name, {rows, cols}, rows, cols);
  }

  MatrixView patch_slice(const std::string& name, const VisionConfig& c) {
    return view(name, {c.embed_dim, c.in_channels, c.patch_size, c.patch_size}, c.embed_dim,
                c.in_channels * c.patch_size * c.patch_size);
  }

  Vector vector(const std::string& name, int64_t size) {
    const MatrixView v = view(name, {size}, 1, size);
    if (v.file == nullptr) return {};
    std::vector<uint8_t> stored(row_bytes(v.type, size));
    Vector out(size);
    dequantize_row(v.type, v.read_rows(0, 1, stored.data()), size, out.data());
    return out;
  }

  NormWeights rms_norm(const std::string& name, int64_t size) { return {vector(name + ".weight", size), {}}; }
  NormWeights layer_norm(const std::string& name, int64_t size) {
    return {vector(name + ".weight", size), vector(name + ".bias", size)};
  }
  LinearWeights linear(const std::string& name, int64_t out, int64_t in) {
    return {matrix(name + ".weight", out, in), {}, update(name, out, in)};
  }
  LinearWeights linear_with_bias(const std::string& name, int64_t out, int64_t in) {
    return linear_stored_as(name, name, out, in);
  }
  LinearWeights linear_stored_as(const std::string& stored, const std::string& name, int64_t out,
                                 int64_t in) {
    return {matrix(stored + ".weight", out, in), vector(stored + ".bias", out), update(name, out, in)};
  }

  LowRankUpdate update(const std::string& name, int64_t rows, int64_t cols) {
    const auto node = updates_.extract(name + ".weight");
    if (node.empty()) return {};
    LowRankUpdate& found = node.mapped();
    const auto size = [](int64_t n, int64_t m) { return static_cast<size_t>(n * m); };
    if (found.a.size() != size(found.rank, cols) || found.b.size() != size(rows, found.rank))
      throw std::invalid_argument(
          "update of " + node.key() + ": expected factors " + shape_text(std::vector{found.rank, cols}) +
          " and " + shape_text(std::vector{rows, found.rank}) + ", found " + std::to_string(found.a.size()) +
          " and " + std::to_string(found.b.size()) + " values");
    return std::move(found);
  }

  /// Of the vision tower, which is there.
  bool has_swapped_feed_forward() const {
    return qwen2vl::has_swapped_feed_forward(*find_tensor(files_, "v.blk.0.ffn_up.weight").file);
  }

  void finish(Types types) const {
    if (types == Types::Computed && problems_.empty() && !not_computed_.empty())
      throw UnsupportedError(not_computed_);
    if (problems_.empty()) return require_no_updates_left();
    constexpr size_t kShown = 40;  // a screen
    std::string text = files_[0]->path() + ": " + std::to_string(problems_.size()) +
                       " tensor(s) do not fit the configuration:";
    for (size_t i = 0; i < problems_.size() && i < kShown; ++i) text += "\n  " + problems_[i];
    if (problems_.size() > kShown) text += "\n  and " + std::to_string(problems_.size() - kShown) + " more";
    throw FormatError(text);
  }

 private:
  void require_no_updates_left() const {
    if (!updates_.empty())
      throw std::invalid_argument("update of " + printable(updates_.begin()->first) +
                                  ": the model has no such matrix");
  }

  MatrixView view(const std::string& name, std::vector<int64_t> shape, int64_t rows, int64_t cols) {
    const FoundTensor found = find_tensor(files_, name);
    if (found.tensor == nullptr) {
      problems_.push_back(name + ": missing");
      return {};
    }
    if (found.tensor->shape != shape) {
      problems_.push_back(name + ": expected shape " + shape_text(shape) + ", found " +
                          shape_text(found.tensor->shape));
      return {};
    }
    const DTypeTraits* traits = find_dtype(found.tensor->type);
    if (traits == nullptr) {
      if (not_computed_.empty())
        not_computed_ = found.file->path() + ": " + name + ": stored as " +
                        std::string(gguf::find_storage_type(found.tensor->type)->name) +
                        ", which is not computed; computed are " + dtype_names() +
                        " (qwen2vl-q quantize reads most others)";
      return {};
    }
    return {traits->type, rows, cols, nullptr, found.tensor->input, found.tensor->offset};
  }

  std::span<const gguf::File* const> files_;
  LowRankUpdates updates_;  // that no matrix has taken yet
  std::vector<std::string> problems_;
  std::string not_computed_;  // the complaint about the first tensor of a type that is not
};

TextWeights load_text(Loader& load, const TextConfig& c) {
  TextWeights w;
  w.embed_tokens = load.matrix("token_embd.weight", c.vocab_size, c.hidden_size);
  w.embed_tokens_update = load.update("token_embd", c.vocab_size, c.hidden_size);
  for (int64_t i = 0; i < c.num_hidden_layers; ++i) {
    const std::string blk = "blk." + std::to_string(i) + ".";
    DecoderLayerWeights l;
    l.input_layernorm = load.rms_norm(blk + "attn_norm", c.hidden_size);
    l.q_proj = load.linear_with_bias(blk + "attn_q", c.q_size(), c.hidden_size);
    l.k_proj = load.linear_with_bias(blk + "attn_k", c.kv_size(), c.hidden_size);
    l.v_proj = load.linear_with_bias(blk + "attn_v", c.kv_size(), c.hidden_size);
    l.o_proj = load.linear(blk + "attn_output", c.hidden_size, c.q_size());
    l.post_attention_layernorm = load.rms_norm(blk + "ffn_norm", c.hidden_size);
    l.gate_proj = load.linear(blk + "ffn_gate", c.intermediate_size, c.hidden_size);
    l.up_proj = load.linear(blk + "ffn_up", c.intermediate_size, c.hidden_size);
    l.down_proj = load.linear(blk + "ffn_down", c.hidden_size, c.intermediate_size);
    w.layers.push_back(std::move(l));
  }
  w.norm = load.rms_norm("output_norm", c.hidden_size);
  if (!c.tie_word_embeddings) w.lm_head = load.matrix("output.weight", c.vocab_size, c.hidden_size);
  w.lm_head_update = load.update("output", c.vocab_size, c.hidden_size);
  return w;
}

VisionWeights load_vision(Loader& load, const VisionConfig& c) {
  VisionWeights w;
  const bool swapped = load.has_swapped_feed_forward();
  const std::string fc1 = swapped ? "ffn_down" : "ffn_up", fc2 = swapped ? "ffn_up" : "ffn_down";
  w.patch_embed[0] = load.patch_slice("v.patch_embd.weight", c);
  w.patch_embed[1] = load.patch_slice("v.patch_embd.weight.1", c);
  w.patch_embed_update = load.update("v.patch_embd", c.embed_dim, c.patch_dim());
  for (int64_t i = 0; i < c.depth; ++i) {
    const std::string blk = "v.blk." + std::to_string(i) + ".";
    VisionBlockWeights b;
    b.norm1 = load.layer_norm(blk + "ln1", c.embed_dim);
    b.q = load.linear_with_bias(blk + "attn_q", c.embed_dim, c.embed_dim);
    b.k = load.linear_with_bias(blk + "attn_k", c.embed_dim, c.embed_dim);
    b.v = load.linear_with_bias(blk + "attn_v", c.embed_dim, c.embed_dim);
    b.proj = load.linear_with_bias(blk + "attn_out", c.embed_dim, c.embed_dim);
    b.norm2 = load.layer_norm(blk + "ln2", c.embed_dim);
    b.fc1 = load.linear_stored_as(blk + fc1, blk + "ffn_up", c.intermediate_size, c.embed_dim);
    b.fc2 = load.linear_stored_as(blk + fc2, blk + "ffn_down", c.embed_dim, c.intermediate_size);
    w.blocks.push_back(std::move(b));
  }
  const int64_t merged = c.embed_dim * c.merge_unit();
  w.ln_q = load.layer_norm("v.post_ln", c.embed_dim);
  w.mlp_0 = load.linear_with_bias("mm.0", merged, merged);
  w.mlp_2 = load.linear_with_bias("mm.2", c.hidden_size, merged);
  return w;
}

}  // namespace

const uint8_t* MatrixView::read_rows(int64_t begin, int64_t n, uint8_t* room) const {
  const int64_t stride = row_bytes(type, cols);
  if (data != nullptr) return data + begin * stride;
  file->read(offset + static_cast<uint64_t>(begin * stride), {room, static_cast<size_t>(n * stride)});
  return room;
}

Weights load_weights(std::vector<std::unique_ptr<gguf::File>> files, const ModelConfig& config,
                     LowRankUpdates updates, Types types) {
  std::vector<const gguf::File*> views;
  for (const auto& file : files) views.push_back(file.get());
  Weights weights;
  weights.is_updated = !updates.empty();
  Loader load(views, std::move(updates));
  weights.text = load_text(load, config.text);
  if (config.vision) weights.vision = load_vision(load, *config.vision);
  load.finish(types);
  weights.files = std::move(files);
  return weights;
}

}  // namespace qwen2vl
