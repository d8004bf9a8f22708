#include "cpu/language_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace qwen2vl::cpu {
namespace {

// What each choice gains and costs: docs/decisions/0043. Keys and values are few where query heads share
// them, and every later token meets theirs.
constexpr InputsByBits kOfQueries = {Inputs::Fine, Inputs::Blocks, Inputs::Blocks};
constexpr InputsByBits kOfKeysAndValues = {Inputs::Fine, Inputs::Fine, Inputs::Blocks};
constexpr InputsByBits kOfOutputs = {Inputs::Fine, Inputs::Blocks, Inputs::Groups};
constexpr InputsByBits kOfDown = {Inputs::Blocks, Inputs::Groups, Inputs::Groups};

void rms_norm_rows(Context& ctx, const NormWeights& norm, float eps, const float* x, int64_t rows,
                   int64_t width, float* out) {
  const auto stage = ctx.profile.stage("text norm");
  ctx.for_rows(rows, [&](int64_t r) {
    ctx.kernels.rms_norm(x + r * width, norm.weight.data(), eps, width, out + r * width);
  });
}

}  // namespace

LanguageModel::LanguageModel(const TextConfig& config, const TextWeights& w, Context& ctx,
                             const Progress& progress)
    : config_(config),
      pages_(config, ctx.precision, SplitChannels(config, w)),
      // Where nothing else is rounded to 8 bits, bf16 would be the largest error.
      attention_(config, std::any_of(w.layers.begin(), w.layers.end(), [](const DecoderLayerWeights& l) {
                   return is_quantized(l.q_proj.weight.type);
                 })) {
  // The head's errors are the logits' own.
  embed_tokens_ = pack_matrix("text lm_head", w.embed_tokens, ctx, Inputs::Fine,
                              w.lm_head ? LowRankUpdate{} : w.lm_head_update);
  embed_tokens_update_ = w.embed_tokens_update;
  for (const DecoderLayerWeights& l : w.layers) {
    layers_.push_back(
        {l.input_layernorm, l.post_attention_layernorm,
         pack_linear("text qkv_proj",
                     {{&l.q_proj, kOfQueries}, {&l.k_proj, kOfKeysAndValues}, {&l.v_proj, kOfKeysAndValues}},
                     ctx, &l.input_layernorm),
         pack_linear("text o_proj", {{&l.o_proj, kOfOutputs}}, ctx),
         pack_linear("text gate_up_proj", {&l.gate_proj, &l.up_proj}, ctx, &l.post_attention_layernorm),
         pack_linear("text down_proj", {{&l.down_proj, kOfDown}}, ctx)});
    progress(static_cast<int64_t>(layers_.size()), config.num_hidden_layers);
  }
  norm_ = w.norm;
  if (w.lm_head) lm_head_ = pack_matrix("text lm_head", *w.lm_head, ctx, Inputs::Fine, w.lm_head_update);
  for (int64_t i = 0; i < config.head_dim / 2; ++i)
    inv_freq_.push_back(static_cast<float>(
        1.0 / std::pow(static_cast<double>(config.rope_theta),
                       static_cast<double>(2 * i) / static_cast<double>(config.head_dim))));
}

void LanguageModel::release_buffers() {
  for (FloatBuffer* buffer : {&x_, &normed_, &qkv_, &wide_, &rope_}) buffer->release();
}

int64_t LanguageModel::weight_bytes() const {
  int64_t bytes = embed_tokens_.weight_bytes() + lm_head_.weight_bytes();
  for (const Layer& l : layers_)
    bytes += l.qkv_proj.weight_bytes() + l.o_proj.weight_bytes() + l.gate_up_proj.weight_bytes() +
             l.down_proj.weight_bytes();
  return bytes;
}

int64_t LanguageModel::read_weights(Context& ctx) {
  // What PeakLoops::read takes, and pieces as measure_limits has them.
  constexpr int64_t kUnit = 4096, kPiece = 64 * kUnit;
  std::vector<std::span<const uint8_t>> pieces;
  const auto add = [&](const PackedLinear& linear) {
    for (const std::span<const uint8_t> stored : linear.storage()) {
      const std::span<const uint8_t> bytes = stored.first(stored.size() / kUnit * kUnit);
      for (size_t at = 0; at < bytes.size(); at += kPiece)
        pieces.push_back(bytes.subspan(at, std::min<size_t>(kPiece, bytes.size() - at)));
    }
  };
  for (const Layer& l : layers_)
    for (const PackedLinear* linear : {&l.qkv_proj, &l.o_proj, &l.gate_up_proj, &l.down_proj}) add(*linear);
  add(head_weights());
  ctx.pool.parallel_for(static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      volatile uint64_t sink = ctx.kernels.peaks.read(pieces[i].data(), pieces[i].size());
      (void)sink;
    }
  });
  int64_t bytes = 0;
  for (const auto& piece : pieces) bytes += static_cast<int64_t>(piece.size());
  return bytes;
}

// Qwen2VLTextModel.forward and the head
void LanguageModel::operator()(Context& ctx, std::span<const SequenceRows> batch, float* logits,
                               const Progress& progress) {
  std::vector<CausalRows> sequences(batch.size());
  rows_ = decoded_ = 0;
  for (const bool decoded : {true, false}) {
    for (size_t i = 0; i < batch.size(); ++i) {
      const SequenceRows& s = batch[i];
      if (s.decoded != decoded) continue;
      const int64_t n = static_cast<int64_t>(s.token_ids.size());
      sequences[i] = {&pages_, s.pages, rows_, n, s.first_cell, decoded};
      rows_ += n;
    }
    if (decoded) decoded_ = rows_;
  }
  x_.resize(rows_ * config_.hidden_size);
  normed_.resize(rows_ * config_.hidden_size);
  qkv_.resize(rows_ * (config_.q_size() + 2 * config_.kv_size()));
  wide_.resize(rows_ * config_.intermediate_size);

  embed_tokens(ctx, batch, sequences);
  for (size_t i = 0; i < layers_.size(); ++i) {
    progress(static_cast<int64_t>(i), config_.num_hidden_layers);
    attention(ctx, layers_[i], static_cast<int64_t>(i), sequences);
    mlp(ctx, layers_[i]);
  }
  head(ctx, batch, sequences, logits);
  progress(config_.num_hidden_layers, config_.num_hidden_layers);
}

void LanguageModel::embedding(int32_t token, float* out) const {
  dequantize_panel_row(embed_tokens_.parts[0].matrix, token, out);
  const auto& [rank, a, b] = embed_tokens_update_;
  for (int64_t i = 0; i < rank; ++i) {
    const float factor = b[token * rank + i];
    for (int64_t c = 0; c < config_.hidden_size; ++c) out[c] += factor * a[i * config_.hidden_size + c];
  }
}

/// Embeddings into x_, and the rotation of every row: the first mrope_section[0] frequencies turn with the
/// time index, the next with the row, the last with the column (apply_multimodal_rotary_pos_emb).
void LanguageModel::embed_tokens(Context& ctx, std::span<const SequenceRows> batch,
                                 std::span<const CausalRows> sequences) {
  const auto stage = ctx.profile.stage("text embed");
  const int64_t hidden = config_.hidden_size, half = config_.head_dim / 2;
  x_.resize(rows_ * hidden);
  rope_.resize(rows_ * 2 * half);
  for (size_t i = 0; i < batch.size(); ++i) {
    const SequenceRows& s = batch[i];
    float* x = x_.data() + sequences[i].first_row * hidden;
    float* rope = rope_.data() + sequences[i].first_row * 2 * half;
    ctx.for_rows(sequences[i].rows, [&, x, rope](int64_t r) {
      if (s.embeddings[r] != nullptr)
        std::memcpy(x + r * hidden, s.embeddings[r], hidden * sizeof(float));
      else
        embedding(s.token_ids[r], x + r * hidden);
      int64_t i = 0;
      for (int axis = 0; axis < 3; ++axis)
        for (int64_t end = i + config_.mrope_section[axis]; i < end; ++i) {
          const float angle = static_cast<float>(s.positions[r][axis]) * inv_freq_[i];
          rope[r * 2 * half + i] = std::cos(angle);
          rope[r * 2 * half + half + i] = std::sin(angle);
        }
    });
  }
}

// Qwen2VLDecoderLayer: x += o_proj(attention(input_layernorm(x)))
void LanguageModel::attention(Context& ctx, const Layer& layer, int64_t index,
                              std::span<const CausalRows> sequences) {
  const int64_t hidden = config_.hidden_size;
  const int64_t stride = config_.q_size() + 2 * config_.kv_size();
  float *x = x_.data(), *normed = normed_.data(), *qkv = qkv_.data();

  rms_norm_rows(ctx, layer.input_layernorm, config_.rms_norm_eps, x, rows_, hidden, normed);
  linear(ctx, layer.qkv_proj, {normed, rows_, hidden, decoded_}, qkv, stride, Store::Overwrite);
  rotate_and_store(ctx, index, sequences);
  attention_(ctx, index, sequences, qkv, stride);
  linear(ctx, layer.o_proj, {qkv, rows_, stride, decoded_}, x, hidden, Store::Accumulate);
}

/// Rotates queries and keys where they stand and stores keys and values in their pages.
void LanguageModel::rotate_and_store(Context& ctx, int64_t index, std::span<const CausalRows> sequences) {
  const auto stage = ctx.profile.stage("text rope");
  const int64_t head_dim = config_.head_dim, half = head_dim / 2;
  const int64_t stride = config_.q_size() + 2 * config_.kv_size();
  float *qkv = qkv_.data(), *rope = rope_.data();
  for (const CausalRows& s : sequences)
    ctx.for_rows(s.rows, [&](int64_t i) {
      const int64_t row = s.first_row + i;
      float* q = qkv + row * stride;  // and the keys behind them
      const float* cos = rope + row * 2 * half;
      for (int64_t h = 0; h < config_.num_attention_heads + config_.num_key_value_heads; ++h)
        ctx.kernels.rope(q + h * head_dim, cos, cos + half, half);
      const float* k = q + config_.q_size();
      const int64_t cell = s.first_cell + i;
      pages_.write(ctx.kernels, s.pages[cell / kPageCells], index, cell % kPageCells, k,
                   k + config_.kv_size());
    });
}

// Qwen2MLP: x += down_proj(silu(gate_proj(h)) * up_proj(h)), h = post_attention_layernorm(x)
void LanguageModel::mlp(Context& ctx, const Layer& layer) {
  const int64_t hidden = config_.hidden_size;
  float *x = x_.data(), *normed = normed_.data();
  rms_norm_rows(ctx, layer.post_attention_layernorm, config_.rms_norm_eps, x, rows_, hidden, normed);
  const InputRows h = linear_swiglu(ctx, layer.gate_up_proj, {normed, rows_, hidden, decoded_}, wide_.data());
  linear(ctx, layer.down_proj, h, x, hidden, Store::Accumulate);
}

void LanguageModel::head(Context& ctx, std::span<const SequenceRows> batch,
                         std::span<const CausalRows> sequences, float* logits) {
  const int64_t hidden = config_.hidden_size;
  const float* x = x_.data();
  float* normed = normed_.data();
  std::vector<int64_t> wanted;
  for (size_t i = 0; i < batch.size(); ++i) {
    const int64_t n = sequences[i].rows;
    const int64_t first = batch[i].logits == LogitsWanted::All    ? 0
                          : batch[i].logits == LogitsWanted::Last ? n - 1
                                                                  : n;
    for (int64_t r = first; r < n; ++r) wanted.push_back(sequences[i].first_row + r);
  }
  if (wanted.empty()) return;
  const int64_t n = static_cast<int64_t>(wanted.size());
  ctx.for_rows(n, [&](int64_t r) {
    ctx.kernels.rms_norm(x + wanted[r] * hidden, norm_.weight.data(), config_.rms_norm_eps, hidden,
                         normed + r * hidden);
  });
  linear(ctx, head_weights(), {normed, n, hidden}, logits, config_.vocab_size, Store::Overwrite);
}

}  // namespace qwen2vl::cpu
