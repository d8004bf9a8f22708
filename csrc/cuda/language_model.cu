#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cuda/kernels/decode_attention.cuh"
#include "cuda/kernels/few_rows.cuh"
#include "cuda/kernels/flash_attention.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/plain.cuh"
#include "cuda/kernels/step.cuh"
#include "cuda/language_model.h"

namespace qwen2vl::cuda {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kLikeliestParts = 64;
constexpr int64_t kHeadRows = 64;  // of which logits are computed together, where all are wanted

qwen2vl_linear bare(const qwen2vl_matrix& matrix) { return {matrix, {nullptr, 0}}; }

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

int64_t padded(int64_t head_dim) {
  for (int64_t size : {32, 64, 96, 128})
    if (head_dim <= size) return size;
  throw UnsupportedError("the CUDA backend's fast kernels take a head_dim of 128 at most, found " +
                         std::to_string(head_dim) + " (precision exact takes up to 256)");
}

}  // namespace

LanguageModel::LanguageModel(Context& ctx, const qwen2vl_text& text, bool exact, const Report& report)
    : ctx_(ctx),
      text_(text),
      exact_(exact),
      padded_head_dim_(exact ? text.head_dim : padded(text.head_dim)),
      pool_(
          ctx,
          PageLayout{static_cast<int32_t>(text.num_key_value_heads), static_cast<int32_t>(padded_head_dim_)},
          text.num_hidden_layers, exact ? 4 : 2) {
  q_size_ = text.num_attention_heads * text.head_dim;
  kv_size_ = text.num_key_value_heads * text.head_dim;
  if (text.head_dim > 256)
    throw UnsupportedError("the CUDA backend takes a head_dim of 256 at most, found " +
                           std::to_string(text.head_dim));
  PackingBuffers buffers;
  const auto vector = [&](const qwen2vl_vector& v) { return store_floats(ctx, v.data, v.size); };
  const qwen2vl_linear embedding = bare(text.embed_tokens), head = bare(text.lm_head);
  const bool tied = text.lm_head.data == nullptr;
  if (exact) {
    stored_embed_tokens_ = store(ctx, "text lm_head", embedding);
    if (!tied) stored_lm_head_ = store(ctx, "text lm_head", head);
  } else {
    embed_tokens_ = pack(ctx, "text lm_head", neighbouring(embedding), buffers);
    if (!tied) lm_head_ = pack(ctx, "text lm_head", neighbouring(head), buffers);
  }
  for (int64_t i = 0; i < text.num_hidden_layers; ++i) {
    const qwen2vl_decoder_layer& w = text.layers[i];
    Layer layer{};
    layer.input_layernorm = vector(w.input_layernorm.weight);
    layer.post_attention_layernorm = vector(w.post_attention_layernorm.weight);
    if (exact) {
      layer.q = store(ctx, "text qkv_proj", w.q_proj);
      layer.k = store(ctx, "text qkv_proj", w.k_proj);
      layer.v = store(ctx, "text qkv_proj", w.v_proj);
      layer.o = store(ctx, "text o_proj", w.o_proj);
      layer.gate = store(ctx, "text gate_up_proj", w.gate_proj);
      layer.up = store(ctx, "text gate_up_proj", w.up_proj);
      layer.down = store(ctx, "text down_proj", w.down_proj);
    } else {
      Pairs qkv;
      append_heads(qkv, w.q_proj, text.num_attention_heads, text.head_dim);
      append_heads(qkv, w.k_proj, text.num_key_value_heads, text.head_dim);
      append_heads(qkv, w.v_proj, text.num_key_value_heads, text.head_dim);
      layer.qkv_proj = pack(ctx, "text qkv_proj", qkv, buffers);
      layer.o_proj = pack(ctx, "text o_proj", neighbouring(w.o_proj), buffers);
      layer.gate_up_proj = pack(ctx, "text gate_up_proj", side_by_side(w.gate_proj, w.up_proj), buffers);
      layer.down_proj = pack(ctx, "text down_proj", neighbouring(w.down_proj), buffers);
    }
    layers_.push_back(std::move(layer));
    report(i + 1, text.num_hidden_layers);
  }
  norm_ = vector(text.norm.weight);
  std::vector<float> inv_freq;
  for (int64_t i = 0; i < text.head_dim / 2; ++i)
    inv_freq.push_back(
        static_cast<float>(1.0 / std::pow(static_cast<double>(text.rope_theta),
                                          static_cast<double>(2 * i) / static_cast<double>(text.head_dim))));
  inv_freq_ = store_floats(ctx, inv_freq.data(), static_cast<int64_t>(inv_freq.size()));

  const int64_t counters = kFewRows * text.num_attention_heads * 4;
  arrived_.resize(counters);
  likeliest_arrived_.resize(kFewRows * 4);
  likeliest_parts_.resize(kFewRows * kLikeliestParts * static_cast<int64_t>(sizeof(Likeliest)));
  check(cudaMemsetAsync(arrived_.as(), 0, static_cast<size_t>(counters), ctx.stream), "cudaMemset");
  check(cudaMemsetAsync(likeliest_arrived_.as(), 0, kFewRows * 4, ctx.stream), "cudaMemset");
  check(cudaEventCreateWithFlags(&staged_, cudaEventDisableTiming), "cudaEventCreate");
  for (Result& result : results_) {
    result.tokens = PinnedBuffer(kFewRows * 4);
    check(cudaEventCreateWithFlags(&result.done, cudaEventDisableTiming), "cudaEventCreate");
  }
}

LanguageModel::~LanguageModel() {
  (void)cudaStreamSynchronize(ctx_.stream);
  drop_graphs();
  if (staged_ != nullptr) (void)cudaEventDestroy(staged_);
  for (Result& result : results_)
    if (result.done != nullptr) (void)cudaEventDestroy(result.done);
}

void LanguageModel::drop_graphs() {
  for (auto& [key, graph] : graphs_) {
    if (graph.exec != nullptr) (void)cudaGraphExecDestroy(graph.exec);
    if (graph.graph != nullptr) (void)cudaGraphDestroy(graph.graph);
  }
  graphs_.clear();
}

// --- buffers -----------------------------------------------------------------------------------------------

void LanguageModel::reserve(int64_t rows) {
  if (rows <= reserved_rows_) return;
  ctx_.synchronize();
  drop_graphs();  // they name the old buffers
  rows = rows <= kFewRows ? kFewRows : (rows + 255) / 256 * 256;
  const int64_t hidden = text_.hidden_size, wide = text_.intermediate_size, half = text_.head_dim / 2;
  const auto zeroed = [&](DeviceBuffer& buffer, int64_t bytes) {
    buffer.resize(bytes);
    check(cudaMemsetAsync(buffer.as(), 0, static_cast<size_t>(bytes), ctx_.stream), "cudaMemset");
  };
  row_info_.resize(rows * static_cast<int64_t>(sizeof(RowInfo)));
  staged_info_ = PinnedBuffer(rows * static_cast<int64_t>(sizeof(RowInfo)));
  x_.resize(rows * hidden * 4);
  rotation_.resize(rows * 2 * half * 4);
  if (exact_) {
    qkv_.resize(rows * (q_size_ + 2 * kv_size_) * 4);
    float_normed_.resize(rows * hidden * 4);
    float_attended_.resize(rows * q_size_ * 4);
    gate_.resize(rows * wide * 4);
    up_.resize(rows * wide * 4);
  } else {
    // What is beyond a row's columns is never written, and multiplied: it has to be zero.
    const Layer& l = layers_[0];
    zeroed(normed_, rows * l.qkv_proj.stride * 2);
    zeroed(queries_, rows * text_.num_attention_heads * padded_head_dim_ * 2);
    zeroed(attended_, rows * l.o_proj.stride * 2);
    zeroed(wide_, rows * l.down_proj.stride * 2);
    parts_.resize(kFewRows * (text_.num_attention_heads + text_.num_key_value_heads) * kMaxChunks *
                  (2 + padded_head_dim_) * 4);
  }
  reserved_rows_ = rows;
}

/// Where the rows stand and what stands in them, onto the device.
int64_t LanguageModel::upload(std::span<const SequenceRows> batch) {
  const int64_t hidden = text_.hidden_size;
  int64_t rows = 0, given = 0;
  for (const SequenceRows& s : batch) {
    rows += s.n;
    for (int64_t i = 0; i < s.n; ++i) given += s.embeddings[i] != nullptr;
  }
  if (rows > kMaxBatchRows)
    throw std::invalid_argument("a batch has " + std::to_string(kMaxBatchRows) + " rows at most, found " +
                                std::to_string(rows));
  reserve(rows);
  if (given * hidden * 4 > embeddings_.bytes()) {
    ctx_.synchronize();
    embeddings_.resize(given * hidden * 4);
  }
  check(cudaEventSynchronize(staged_), "cudaEventSynchronize");
  tables_.put(ctx_, batch);
  RowInfo* info = staged_info_.as<RowInfo>();
  int64_t at = 0;
  for (size_t sequence = 0; sequence < batch.size(); ++sequence) {
    const SequenceRows& s = batch[sequence];
    for (int64_t i = 0; i < s.n;) {
      // Embeddings of an image are neighbours: they travel together.
      int64_t run = 1;
      if (s.embeddings[i] != nullptr) {
        while (i + run < s.n && s.embeddings[i + run] == s.embeddings[i] + run * hidden) ++run;
        ctx_.copy_to_device(embeddings_.as<float>() + at * hidden, s.embeddings[i], run * hidden * 4);
      }
      for (int64_t j = i; j < i + run; ++j, ++info) {
        const bool token = s.embeddings[j] == nullptr;
        *info = RowInfo{tables_.table(sequence),
                        token ? nullptr : embeddings_.as<float>() + (at + j - i) * hidden,
                        s.token_ids[j],
                        static_cast<int32_t>(s.first_cell + j),
                        {s.positions[3 * j], s.positions[3 * j + 1], s.positions[3 * j + 2]}};
      }
      if (s.embeddings[i] != nullptr) at += run;
      i += run;
    }
  }
  ctx_.copy_to_device(row_info_.as(), staged_info_.as(), rows * static_cast<int64_t>(sizeof(RowInfo)));
  check(cudaEventRecord(staged_, ctx_.stream), "cudaEventRecord");
  return rows;
}

// --- the forward pass --------------------------------------------------------------------------------------

// Qwen2VLTextModel.forward and the head
void LanguageModel::operator()(std::span<const SequenceRows> batch, float* logits, const Report& report) {
  const bool steps = std::all_of(batch.begin(), batch.end(), [](const SequenceRows& s) {
    return s.n == 1 && s.logits == 1 && s.embeddings[0] == nullptr;
  });
  if (steps && logits == nullptr && !exact_ && static_cast<int64_t>(batch.size()) <= kFewRows)
    return step(batch, report);

  ahead_.at_work = false;
  const int64_t rows = upload(batch);
  embed_tokens(rows);
  int64_t chunks = 1;
  for (const SequenceRows& s : batch) chunks = std::max(chunks, chunks_of(s.first_cell + s.n));
  for (int64_t i = 0; i < text_.num_hidden_layers; ++i) {
    report(i, text_.num_hidden_layers);
    if (exact_)
      layer_plain(i, rows);
    else if (rows <= kFewRows)
      layer_few(i, rows, chunks, false);
    else
      layer_many(i, batch, rows);
  }

  std::vector<int64_t> wanted;
  int64_t row = 0;
  for (const SequenceRows& s : batch) {
    for (int64_t i = s.logits == 2 ? 0 : s.logits == 1 ? s.n - 1 : s.n; i < s.n; ++i)
      wanted.push_back(row + i);
    row += s.n;
  }
  const int64_t hidden = text_.hidden_size, vocab = text_.vocab_size;
  const int64_t n = static_cast<int64_t>(wanted.size());
  results_[current_].rows = 0;
  if (logits == nullptr && n > kFewRows)
    throw std::invalid_argument("logits of " + std::to_string(kFewRows) + " rows at most stay on the device");
  for (int64_t begin = 0; begin < n; begin += kHeadRows) {
    const int64_t some = std::min(kHeadRows, n - begin);
    head_rows_.resize(kHeadRows * hidden * 4);
    for (int64_t i = 0; i < some;) {
      int64_t run = 1;
      while (i + run < some && wanted[begin + i + run] == wanted[begin + i] + run) ++run;
      check(cudaMemcpyAsync(head_rows_.as<float>() + i * hidden, x_.as<float>() + wanted[begin + i] * hidden,
                            static_cast<size_t>(run * hidden) * 4, cudaMemcpyDeviceToDevice, ctx_.stream),
            "copying rows");
      i += run;
    }
    if (logits != nullptr) {
      head_logits_.resize(some * vocab * 4);
      head(head_rows_.as<float>(), some, head_logits_.as<float>());
      ctx_.copy_to_host(logits + begin * vocab, head_logits_.as(), some * vocab * 4);
    } else {
      Result& result = results_[current_];
      if (some * vocab * 4 > result.logits.bytes()) {
        ctx_.synchronize();
        drop_graphs();
        result.logits.resize(some * vocab * 4);
      }
      head(head_rows_.as<float>(), some, result.logits.as<float>());
      find_likeliest(some, result, false);
      check(cudaEventRecord(result.done, ctx_.stream), "cudaEventRecord");
      result.rows = some;
    }
  }
  remember(batch);
  report(text_.num_hidden_layers, text_.num_hidden_layers);
}

void LanguageModel::remember(std::span<const SequenceRows> batch) {
  const SequenceRows& s = batch[0];
  last_ = {false, batch.size() == 1 ? s.pages.back() : nullptr, s.first_cell + s.n};
}

void LanguageModel::embed_tokens(int64_t rows) {
  const auto stage = ctx_.stage("text embed");
  const auto [time, row, column] = text_.mrope_section;
  Embed p{};
  p.rows = row_info_.as<RowInfo>();
  p.inv_freq = inv_freq_;
  p.section_ends[0] = static_cast<int32_t>(time);
  p.section_ends[1] = static_cast<int32_t>(time + row);
  p.section_ends[2] = static_cast<int32_t>(time + row + column);
  p.half = static_cast<int32_t>(text_.head_dim / 2);
  p.hidden = static_cast<int32_t>(text_.hidden_size);
  p.x = x_.as<float>();
  p.rotation = rotation_.as<float>();
  const Launch how{"text embed", dim3(static_cast<unsigned>(rows), kEmbedParts), 128, 0, true};
  if (exact_) {
    p.stored_rows = stored_embed_tokens_.weight;
    p.stored_row_bytes = stored_embed_tokens_.row_bytes;
    return visit_dtype(stored_embed_tokens_.type,
                       [&]<DType T>() { launch(ctx_.stream, how, embed_rows<T, true>, p); });
  }
  p.embed_tokens = embed_tokens_.parts[0];
  visit_packed(p.embed_tokens.type, [&]<DType T>() { launch(ctx_.stream, how, embed_rows<T, false>, p); });
}

namespace {

void norm(Context& ctx, const float* x, const float* weight, float eps, int64_t width, int64_t rows,
          uint16_t* half_out, float* out, int64_t stride) {
  qwen2vl::cuda::norm(ctx, "text norm",
                      {x, weight, nullptr, eps, static_cast<int32_t>(width), static_cast<int32_t>(rows),
                       half_out, out, stride});
}

Epilogue residual(DeviceBuffer& x, int64_t hidden) {
  Epilogue e;
  e.out = x.as<float>();
  e.stride = hidden;
  e.columns = static_cast<int32_t>(hidden);
  return e;
}

}  // namespace

Epilogue LanguageModel::qkv_epilogue(int64_t layer) const {
  Epilogue e;
  e.pairs_per_head = static_cast<int32_t>(pairs_per_head(text_.head_dim));
  e.half = static_cast<int32_t>(text_.head_dim / 2);
  e.heads = static_cast<int32_t>(text_.num_attention_heads);
  e.head_dim = static_cast<int32_t>(padded_head_dim_);
  e.query_scale = kLog2E / std::sqrt(static_cast<float>(text_.head_dim));
  e.rotation = rotation_.as<float>();
  e.half_out = queries_.as<uint16_t>();
  e.rows = row_info_.as<RowInfo>();
  e.pages = pool_.layout();
  e.layer = static_cast<int32_t>(layer);
  return e;
}

int64_t LanguageModel::chunks_of(int64_t cells) {
  const int pages = ceil_div(static_cast<int>(cells), kPageCells);
  return ceil_div(pages, pages_per_chunk(pages));
}

void LanguageModel::attend_rows(int64_t layer, int64_t first_row, int64_t rows, int64_t chunks, bool single) {
  const int64_t heads = text_.num_attention_heads, kv_heads = text_.num_key_value_heads,
                group = heads / kv_heads;
  const auto stage = ctx_.stage("text attention");
  DecodeAttention p{};
  p.queries = queries_.as<uint16_t>() + first_row * heads * padded_head_dim_;
  p.rows = row_info_.as<RowInfo>() + first_row;
  p.pages = pool_.layout();
  p.layer = static_cast<int32_t>(layer);
  p.group = static_cast<int32_t>(group);
  p.heads = static_cast<int32_t>(heads);
  p.true_head_dim = static_cast<int32_t>(text_.head_dim);
  p.parts = parts_.as<float>();
  p.arrived = arrived_.as<uint32_t>();
  p.stride = layers_[layer].o_proj.stride;
  p.out = attended_.as<uint16_t>() + first_row * p.stride;
  p.single = single ? 1 : 0;
  const Launch how{
      "text attention",
      dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(heads), static_cast<unsigned>(rows)),
      kDecodeThreads, decode_attention_shared_bytes(static_cast<int>(padded_head_dim_)), true};
  const auto run = [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    launch(ctx_.stream, how, decode_attention<kHeadDim>, p);
  };
  switch (padded_head_dim_) {
    case 32:
      return run(std::integral_constant<int, 32>());
    case 64:
      return run(std::integral_constant<int, 64>());
    case 96:
      return run(std::integral_constant<int, 96>());
    default:
      return run(std::integral_constant<int, 128>());
  }
}

// Qwen2VLDecoderLayer for few rows: five launches.
void LanguageModel::layer_few(int64_t index, int64_t rows, int64_t chunks, bool single) {
  const Layer& l = layers_[index];
  const int64_t hidden = text_.hidden_size;
  float* x = x_.as<float>();
  const auto normed = [&](const float* weight) -> FewInput {
    if (rows <= kNormedRows) return {nullptr, x, weight, text_.rms_norm_eps};
    norm(ctx_, x, weight, text_.rms_norm_eps, hidden, rows, normed_.as<uint16_t>(), nullptr,
         l.qkv_proj.stride);
    return {normed_.as<uint16_t>(), nullptr, nullptr, 0};
  };
  few_rows_linear(ctx_, l.qkv_proj, normed(l.input_layernorm), rows, Finish::TextQkv, qkv_epilogue(index));
  attend_rows(index, 0, rows, chunks, single);
  few_rows_linear(ctx_, l.o_proj, {attended_.as<uint16_t>(), nullptr, nullptr, 0}, rows, Finish::Residual,
                  residual(x_, hidden));
  Epilogue wide;
  wide.half_out = wide_.as<uint16_t>();
  wide.stride = l.down_proj.stride;
  wide.columns = static_cast<int32_t>(text_.intermediate_size);
  few_rows_linear(ctx_, l.gate_up_proj, normed(l.post_attention_layernorm), rows, Finish::SwiGlu, wide);
  few_rows_linear(ctx_, l.down_proj, {wide_.as<uint16_t>(), nullptr, nullptr, 0}, rows, Finish::Residual,
                  residual(x_, hidden));
}

// Qwen2VLDecoderLayer for many rows.
void LanguageModel::layer_many(int64_t index, std::span<const SequenceRows> batch, int64_t rows) {
  const Layer& l = layers_[index];
  const int64_t hidden = text_.hidden_size, heads = text_.num_attention_heads,
                kv_heads = text_.num_key_value_heads;
  float* x = x_.as<float>();
  norm(ctx_, x, l.input_layernorm, text_.rms_norm_eps, hidden, rows, normed_.as<uint16_t>(), nullptr,
       l.qkv_proj.stride);
  many_rows_linear(ctx_, l.qkv_proj, normed_.as<uint16_t>(), rows, Finish::TextQkv, qkv_epilogue(index),
                   expanded_);
  int64_t row = 0;
  for (size_t sequence = 0; sequence < batch.size(); ++sequence) {
    const SequenceRows& s = batch[sequence];
    if (s.n == 1) {
      attend_rows(index, row, 1, chunks_of(s.first_cell + 1), true);
    } else {
      const auto stage = ctx_.stage("text attention",
                                    {0,
                                     4.0 * static_cast<double>(s.n) *
                                         (static_cast<double>(s.first_cell) + static_cast<double>(s.n) / 2) *
                                         static_cast<double>(q_size_),
                                     0});
      FlashAttention p{};
      p.queries = queries_.as<uint16_t>() + row * heads * padded_head_dim_;
      p.query_row_stride = heads * padded_head_dim_;
      p.query_head_stride = padded_head_dim_;
      p.rows = static_cast<int32_t>(s.n);
      p.cells = static_cast<int32_t>(s.first_cell + s.n);
      p.page_table = tables_.table(sequence);
      p.pages = pool_.layout();
      p.layer = static_cast<int32_t>(index);
      p.group = static_cast<int32_t>(heads / kv_heads);
      p.first_cell = static_cast<int32_t>(s.first_cell);
      p.stride = l.o_proj.stride;
      p.out = attended_.as<uint16_t>() + row * p.stride;
      p.true_head_dim = static_cast<int32_t>(text_.head_dim);
      const Launch how{"text attention", dim3(blocks(s.n, 64), static_cast<unsigned>(heads)), kFlashThreads,
                       flash_shared_bytes(static_cast<int>(padded_head_dim_), 1)};
      switch (padded_head_dim_) {
        case 32:
          launch(ctx_.stream, how, flash_attention<32, 1>, p);
          break;
        case 64:
          launch(ctx_.stream, how, flash_attention<64, 1>, p);
          break;
        case 96:
          launch(ctx_.stream, how, flash_attention<96, 1>, p);
          break;
        default:
          launch(ctx_.stream, how, flash_attention<128, 1>, p);
      }
    }
    row += s.n;
  }
  many_rows_linear(ctx_, l.o_proj, attended_.as<uint16_t>(), rows, Finish::Residual, residual(x_, hidden),
                   expanded_);
  norm(ctx_, x, l.post_attention_layernorm, text_.rms_norm_eps, hidden, rows, normed_.as<uint16_t>(), nullptr,
       l.gate_up_proj.stride);
  Epilogue wide;
  wide.half_out = wide_.as<uint16_t>();
  wide.stride = l.down_proj.stride;
  wide.columns = static_cast<int32_t>(text_.intermediate_size);
  many_rows_linear(ctx_, l.gate_up_proj, normed_.as<uint16_t>(), rows, Finish::SwiGlu, wide, expanded_);
  many_rows_linear(ctx_, l.down_proj, wide_.as<uint16_t>(), rows, Finish::Residual, residual(x_, hidden),
                   expanded_);
}

// Qwen2VLDecoderLayer in float32, one plain kernel after another.
void LanguageModel::layer_plain(int64_t index, int64_t rows) {
  const Layer& l = layers_[index];
  const int64_t hidden = text_.hidden_size, wide = text_.intermediate_size, heads = text_.num_attention_heads;
  const int64_t kv_heads = text_.num_key_value_heads, stride = q_size_ + 2 * kv_size_;
  float *x = x_.as<float>(), *normed = float_normed_.as<float>(), *qkv = qkv_.as<float>();
  norm(ctx_, x, l.input_layernorm, text_.rms_norm_eps, hidden, rows, nullptr, normed, hidden);
  plain_linear_rows(ctx_, l.q, normed, hidden, rows, qkv, stride, false);
  plain_linear_rows(ctx_, l.k, normed, hidden, rows, qkv + q_size_, stride, false);
  plain_linear_rows(ctx_, l.v, normed, hidden, rows, qkv + q_size_ + kv_size_, stride, false);
  launch(ctx_.stream, {"text rope", dim3(static_cast<unsigned>(rows)), 256}, plain_rotate,
         PlainRotate{qkv, stride, rotation_.as<float>(), static_cast<int32_t>(text_.head_dim / 2),
                     static_cast<int32_t>(heads + kv_heads), row_info_.as<RowInfo>(), pool_.layout(),
                     static_cast<int32_t>(index), static_cast<int32_t>(heads)});
  PlainAttention p{};
  p.queries = qkv;
  p.query_stride = stride;
  p.scale = 1.0f / std::sqrt(static_cast<float>(text_.head_dim));
  p.head_dim = static_cast<int32_t>(text_.head_dim);
  p.group = static_cast<int32_t>(heads / kv_heads);
  p.rows = row_info_.as<RowInfo>();
  p.pages = pool_.layout();
  p.layer = static_cast<int32_t>(index);
  p.out = float_attended_.as<float>();
  p.out_stride = q_size_;
  launch(ctx_.stream, {"text attention", dim3(static_cast<unsigned>(rows), static_cast<unsigned>(heads)), 32},
         plain_attention, p);
  plain_linear_rows(ctx_, l.o, float_attended_.as<float>(), q_size_, rows, x, hidden, true);
  norm(ctx_, x, l.post_attention_layernorm, text_.rms_norm_eps, hidden, rows, nullptr, normed, hidden);
  plain_linear_rows(ctx_, l.gate, normed, hidden, rows, gate_.as<float>(), wide, false);
  plain_linear_rows(ctx_, l.up, normed, hidden, rows, up_.as<float>(), wide, false);
  launch(ctx_.stream, {"text silu", dim3(blocks(rows * wide, 256)), 256}, plain_activation,
         Activate{Activation::SwiGlu, gate_.as<float>(), up_.as<float>(), rows * wide});
  plain_linear_rows(ctx_, l.down, gate_.as<float>(), wide, rows, x, hidden, true);
}

/// Logits [rows][vocab] of rows of the residual stream.
void LanguageModel::head(const float* x, int64_t rows, float* logits) {
  const int64_t hidden = text_.hidden_size;
  if (exact_) {
    norm(ctx_, x, norm_, text_.rms_norm_eps, hidden, rows, nullptr, float_normed_.as<float>(), hidden);
    return plain_linear_rows(ctx_, stored_lm_head_.weight == nullptr ? stored_embed_tokens_ : stored_lm_head_,
                             float_normed_.as<float>(), hidden, rows, logits, text_.vocab_size, false);
  }
  const PackedLinear& linear = lm_head_.parts.empty() ? embed_tokens_ : lm_head_;
  Epilogue e;
  e.out = logits;
  e.stride = text_.vocab_size;
  e.columns = static_cast<int32_t>(text_.vocab_size);
  FewInput input{nullptr, x, norm_, text_.rms_norm_eps};
  if (rows > kNormedRows) {
    norm(ctx_, x, norm_, text_.rms_norm_eps, hidden, rows, normed_.as<uint16_t>(), nullptr, linear.stride);
    input = {normed_.as<uint16_t>(), nullptr, nullptr, 0};
  }
  few_rows_linear(ctx_, linear, input, rows, Finish::Store, e);
}

void LanguageModel::find_likeliest(int64_t rows, Result& result, bool advance) {
  launch(
      ctx_.stream,
      {"likeliest token", dim3(kLikeliestParts, static_cast<unsigned>(rows)), kLikeliestThreads, 128, true},
      qwen2vl::cuda::find_likeliest,
      FindLikeliest{result.logits.as<float>(), text_.vocab_size, likeliest_parts_.as<Likeliest>(),
                    likeliest_arrived_.as<uint32_t>(), result.tokens.as<int32_t>(),
                    advance ? row_info_.as<RowInfo>() : nullptr});
}

// --- decoding steps ----------------------------------------------------------------------------------------

/// One token of each sequence.
void LanguageModel::step(std::span<const SequenceRows> batch, const Report& report) {
  const SequenceRows& s = batch[0];
  const bool goes_on = batch.size() == 1 && last_.greedy && s.first_cell == last_.cells &&
                       s.pages[(s.first_cell - 1) / kPageCells] == last_.page;
  const bool ahead = is_ahead(batch);
  ahead_.at_work = false;
  if (ahead) {
    current_ = 1 - current_;
  } else {
    const int64_t rows = upload(batch);
    int64_t chunks = 1;
    for (const SequenceRows& each : batch) chunks = std::max(chunks, chunks_of(each.first_cell + 1));
    decode(rows, chunks, current_);
  }
  results_[current_].rows = static_cast<int64_t>(batch.size());
  remember(batch);
  report(text_.num_hidden_layers, text_.num_hidden_layers);
  const int64_t next = s.first_cell + 1;
  if (!goes_on || ctx_.timer.on() || next / kPageCells >= static_cast<int64_t>(s.pages.size())) return;
  decode(1, chunks_of(next + 1), 1 - current_);
  ahead_ = {true, next, s.positions[0] + 1};
}

/// Whether this step is at work already: greedy decoding goes on with the token that the device has.
bool LanguageModel::is_ahead(std::span<const SequenceRows> batch) {
  const SequenceRows& s = batch[0];
  if (!ahead_.at_work || batch.size() != 1 || s.first_cell != ahead_.cell || !tables_.holds(s) ||
      !std::all_of(s.positions, s.positions + 3, [&](int32_t p) { return p == ahead_.position; }))
    return false;
  const Result& result = kept(0);
  return s.token_ids[0] == result.tokens.as<int32_t>()[0];
}

void LanguageModel::run_step(int64_t rows, int64_t chunks, int slot) {
  embed_tokens(rows);
  for (int64_t i = 0; i < text_.num_hidden_layers; ++i) layer_few(i, rows, chunks, true);
  head(x_.as<float>(), rows, results_[slot].logits.as<float>());
  find_likeliest(rows, results_[slot], true);
}

/// A step of the rows that row_info_ describes; it leaves them ready for the likeliest tokens' step.
void LanguageModel::decode(int64_t rows, int64_t chunks, int slot) {
  Result& result = results_[slot];
  const int64_t bytes = rows * text_.vocab_size * 4;
  if (bytes > result.logits.bytes()) {
    ctx_.synchronize();
    drop_graphs();
    result.logits.resize(bytes);
  }
  if (ctx_.timer.on()) {
    run_step(rows, chunks, slot);
  } else {
    // Chunks beyond a sequence's own end at once: graphs for powers of two are enough.
    int64_t most = 1;
    while (most < chunks) most *= 2;
    Graph& graph = graphs_[{rows, most, slot}];
    if (graph.exec == nullptr) {
      check(cudaStreamBeginCapture(ctx_.stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
      try {
        run_step(rows, most, slot);
      } catch (...) {
        (void)cudaStreamEndCapture(ctx_.stream, &graph.graph);
        throw;
      }
      check(cudaStreamEndCapture(ctx_.stream, &graph.graph), "cudaStreamEndCapture");
      check(cudaGraphInstantiate(&graph.exec, graph.graph, 0), "cudaGraphInstantiate");
    }
    check(cudaGraphLaunch(graph.exec, ctx_.stream), "a decoding step");
  }
  check(cudaEventRecord(result.done, ctx_.stream), "cudaEventRecord");
}

/// The last call's, when it has been computed.
LanguageModel::Result& LanguageModel::kept(int64_t row) {
  Result& result = results_[current_];
  if (row < 0 || row >= result.rows)
    throw std::invalid_argument("kept logits: expected a row below " + std::to_string(result.rows) +
                                ", found " + std::to_string(row));
  check(cudaEventSynchronize(result.done), "a decoding step");
  return result;
}

int32_t LanguageModel::likeliest(int64_t row) {
  const int32_t token = kept(row).tokens.as<int32_t>()[row];
  last_.greedy = true;
  return token;
}

void LanguageModel::kept_logits(int64_t row, float* out) {
  ctx_.copy_to_host(out, kept(row).logits.as<float>() + row * text_.vocab_size, text_.vocab_size * 4);
}

int64_t LanguageModel::read_weights() {
  int64_t bytes = 0;
  const auto read = [&](const void* at, int64_t n) {
    launch(ctx_.stream,
           {"read_memory", dim3(static_cast<unsigned>(8 * ctx_.properties.multiProcessorCount)), 256},
           read_memory, static_cast<const uint4*>(at), n / 16, likeliest_arrived_.as<uint32_t>());
    bytes += n / 16 * 16;
  };
  const auto packed = [&](const PackedLinear& linear) {
    if (!linear.parts.empty())
      read(linear.parts[0].low, linear.bytes / static_cast<int64_t>(linear.parts.size()));
  };
  const auto stored = [&](const StoredLinear& linear) {
    if (linear.weight != nullptr) read(linear.weight, linear.rows * linear.row_bytes);
  };
  for (const Layer& l : layers_) {
    for (const PackedLinear* linear : {&l.qkv_proj, &l.o_proj, &l.gate_up_proj, &l.down_proj})
      packed(*linear);
    for (const StoredLinear* linear : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) stored(*linear);
  }
  packed(lm_head_.parts.empty() ? embed_tokens_ : lm_head_);
  stored(stored_lm_head_.weight == nullptr ? stored_embed_tokens_ : stored_lm_head_);
  ctx_.synchronize();
  return bytes;
}

}  // namespace qwen2vl::cuda
