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
#include "cuda/pipeline_stage.h"

namespace qwen2vl::cuda {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kLikeliestParts = 64;

qwen2vl_linear bare(const qwen2vl_matrix& matrix) { return {matrix, {nullptr, 0}}; }

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

int64_t padded(int64_t head_dim) {
  for (int64_t size : {32, 64, 96, 128})
    if (head_dim <= size) return size;
  throw UnsupportedError("the CUDA backend's fast kernels take a head_dim of 128 at most, found " +
                         std::to_string(head_dim) + " (precision exact takes up to 256)");
}

}  // namespace

PipelineStage::PipelineStage(Context& context, const qwen2vl_text& text, bool exact, size_t index)
    : ctx(context),
      index_(index),
      text_(text),
      exact_(exact),
      q_size_(text.num_attention_heads * text.head_dim),
      kv_size_(text.num_key_value_heads * text.head_dim),
      padded_head_dim_(exact ? text.head_dim : padded(text.head_dim)) {
  enter();
  for (cudaEvent_t* event : {&staged_, &sent_, &idle_})
    check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreate");
}

PipelineStage::~PipelineStage() {
  (void)cudaSetDevice(ctx.device);
  (void)cudaStreamSynchronize(ctx.stream);
  for (cudaEvent_t event : {staged_, sent_, idle_})
    if (event != nullptr) (void)cudaEventDestroy(event);
}

// --- weights -----------------------------------------------------------------------------------------------

const float* PipelineStage::vector(const qwen2vl_vector& v) { return store_floats(ctx, v.data, v.size); }

void PipelineStage::load_embeddings(PackingBuffers& buffers) {
  const qwen2vl_linear embedding = bare(text_.embed_tokens);
  if (exact_)
    stored_embed_tokens_ = store(ctx, "text lm_head", embedding);
  else
    embed_tokens_ = pack(ctx, "text lm_head", neighbouring(embedding), buffers);
  std::vector<float> inv_freq;
  for (int64_t i = 0; i < text_.head_dim / 2; ++i)
    inv_freq.push_back(
        static_cast<float>(1.0 / std::pow(static_cast<double>(text_.rope_theta),
                                          static_cast<double>(2 * i) / static_cast<double>(text_.head_dim))));
  inv_freq_ = store_floats(ctx, inv_freq.data(), static_cast<int64_t>(inv_freq.size()));
}

void PipelineStage::load_layer(const qwen2vl_decoder_layer& w, PackingBuffers& buffers) {
  Layer layer{};
  layer.input_layernorm = vector(w.input_layernorm.weight);
  layer.post_attention_layernorm = vector(w.post_attention_layernorm.weight);
  if (exact_) {
    layer.q = store(ctx, "text qkv_proj", w.q_proj);
    layer.k = store(ctx, "text qkv_proj", w.k_proj);
    layer.v = store(ctx, "text qkv_proj", w.v_proj);
    layer.o = store(ctx, "text o_proj", w.o_proj);
    layer.gate = store(ctx, "text gate_up_proj", w.gate_proj);
    layer.up = store(ctx, "text gate_up_proj", w.up_proj);
    layer.down = store(ctx, "text down_proj", w.down_proj);
  } else {
    Pairs qkv;
    append_heads(qkv, w.q_proj, text_.num_attention_heads, text_.head_dim);
    append_heads(qkv, w.k_proj, text_.num_key_value_heads, text_.head_dim);
    append_heads(qkv, w.v_proj, text_.num_key_value_heads, text_.head_dim);
    layer.qkv_proj = pack(ctx, "text qkv_proj", qkv, buffers);
    layer.o_proj = pack(ctx, "text o_proj", neighbouring(w.o_proj), buffers);
    layer.gate_up_proj = pack(ctx, "text gate_up_proj", side_by_side(w.gate_proj, w.up_proj), buffers);
    layer.down_proj = pack(ctx, "text down_proj", neighbouring(w.down_proj), buffers);
  }
  layers_.push_back(std::move(layer));
}

void PipelineStage::load_head(PackingBuffers& buffers) {
  norm_ = vector(text_.norm.weight);
  const bool tied = text_.lm_head.data == nullptr,
             here = tied && (embed_tokens_.rows + stored_embed_tokens_.rows) > 0;
  const qwen2vl_linear head = bare(tied ? text_.embed_tokens : text_.lm_head);
  if (!here && exact_) stored_lm_head_ = store(ctx, "text lm_head", head);
  if (!here && !exact_) lm_head_ = pack(ctx, "text lm_head", neighbouring(head), buffers);
  likeliest_arrived_.resize(kFewRows * 4);
  likeliest_parts_.resize(kFewRows * kLikeliestParts * static_cast<int64_t>(sizeof(Likeliest)));
  check(cudaMemsetAsync(likeliest_arrived_.as(), 0, kFewRows * 4, ctx.stream), "cudaMemset");
}

void PipelineStage::finish() {
  const int64_t counters = kFewRows * text_.num_attention_heads * 4;
  arrived_.resize(counters);
  check(cudaMemsetAsync(arrived_.as(), 0, static_cast<size_t>(counters), ctx.stream), "cudaMemset");
  pool_.emplace(
      ctx,
      PageLayout{static_cast<int32_t>(text_.num_key_value_heads), static_cast<int32_t>(padded_head_dim_)},
      layers(), exact_ ? 4 : 2);
}

// --- buffers -----------------------------------------------------------------------------------------------

bool PipelineStage::reserve(int64_t rows) {
  if (rows <= reserved_rows_) return false;
  ctx.synchronize();
  rows = rows <= kFewRows ? kFewRows : (rows + 255) / 256 * 256;
  const int64_t hidden = text_.hidden_size, wide = text_.intermediate_size, half = text_.head_dim / 2;
  const auto zeroed = [&](DeviceBuffer& buffer, int64_t bytes) {
    buffer.resize(bytes);
    check(cudaMemsetAsync(buffer.as(), 0, static_cast<size_t>(bytes), ctx.stream), "cudaMemset");
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
  return true;
}

/// The pages' addresses here, where they are others than the last time.
void PipelineStage::put_tables(const PageTables& tables) {
  page_tables_ = &tables;
  if (tables.version() == tables_version_) return;
  addresses_.clear();
  for (const Page* page : tables.pages())
    addresses_.push_back(page == nullptr ? nullptr : page->parts[index_]);
  const int64_t bytes = static_cast<int64_t>(addresses_.size()) * 8;
  if (bytes > tables_.bytes()) {
    ctx.synchronize();  // a step that reads the old ones may be at work
    tables_.resize(2 * bytes);
  }
  ctx.copy_to_device(tables_.as(), addresses_.data(), bytes);
  tables_version_ = tables.version();
}

uint8_t* const* PipelineStage::table(size_t sequence) const {
  return tables_.as<uint8_t*>() + page_tables_->first(sequence);
}

/// Where the rows stand and what stands in them, onto the device.
void PipelineStage::upload(std::span<const SequenceRows> batch, const PageTables& tables, int64_t rows) {
  const int64_t hidden = text_.hidden_size;
  const auto embedding = [&](const SequenceRows& s, int64_t i) {
    return index_ == 0 ? s.embeddings[i] : nullptr;  // the other stages receive rows
  };
  int64_t given = 0;
  for (const SequenceRows& s : batch)
    for (int64_t i = 0; i < s.n; ++i) given += embedding(s, i) != nullptr;
  if (given * hidden * 4 > embeddings_.bytes()) {
    ctx.synchronize();
    embeddings_.resize(given * hidden * 4);
  }
  check(cudaEventSynchronize(staged_), "cudaEventSynchronize");
  put_tables(tables);
  RowInfo* info = staged_info_.as<RowInfo>();
  int64_t at = 0;
  for (size_t sequence = 0; sequence < batch.size(); ++sequence) {
    const SequenceRows& s = batch[sequence];
    for (int64_t i = 0; i < s.n;) {
      // Embeddings of an image are neighbours: they travel together.
      int64_t run = 1;
      if (const float* rows_of_image = embedding(s, i)) {
        while (i + run < s.n && embedding(s, i + run) == rows_of_image + run * hidden) ++run;
        ctx.copy_to_device(embeddings_.as<float>() + at * hidden, rows_of_image, run * hidden * 4);
      }
      for (int64_t j = i; j < i + run; ++j, ++info) {
        const bool token = embedding(s, j) == nullptr;
        *info = RowInfo{table(sequence),
                        token ? nullptr : embeddings_.as<float>() + (at + j - i) * hidden,
                        s.token_ids[j],
                        static_cast<int32_t>(s.first_cell + j),
                        {s.positions[3 * j], s.positions[3 * j + 1], s.positions[3 * j + 2]}};
      }
      if (embedding(s, i) != nullptr) at += run;
      i += run;
    }
  }
  ctx.copy_to_device(row_info_.as(), staged_info_.as(), rows * static_cast<int64_t>(sizeof(RowInfo)));
  check(cudaEventRecord(staged_, ctx.stream), "cudaEventRecord");
}

void PipelineStage::receive(PipelineStage& from, int64_t rows) {
  // What was here before must have been read, by a call that was cancelled, too; what is sent must have been
  // computed.
  enter();
  check(cudaEventRecord(idle_, ctx.stream), "cudaEventRecord");
  from.enter();
  check(cudaStreamWaitEvent(from.ctx.stream, idle_), "cudaStreamWaitEvent");
  const auto send = [&](DeviceBuffer& to, const DeviceBuffer& what, int64_t width) {
    check(
        cudaMemcpyPeerAsync(to.as(), ctx.device, what.as(), from.ctx.device,
                            static_cast<size_t>(rows * width) * 4, from.ctx.stream),
        "copying rows from device " + std::to_string(from.ctx.device) + " to " + std::to_string(ctx.device));
  };
  send(x_, from.x_, text_.hidden_size);
  send(rotation_, from.rotation_, text_.head_dim / 2 * 2);
  check(cudaEventRecord(from.sent_, from.ctx.stream), "cudaEventRecord");
  enter();
  check(cudaStreamWaitEvent(ctx.stream, from.sent_), "cudaStreamWaitEvent");
}

void PipelineStage::enter() { check(cudaSetDevice(ctx.device), "cudaSetDevice"); }

// --- the forward pass --------------------------------------------------------------------------------------

void PipelineStage::embed_tokens(int64_t rows) {
  const auto stage = ctx.stage("text embed");
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
  const Launch how{"text embed", dim3(static_cast<unsigned>(rows), kEmbedParts), kEmbedThreads, 0, true};
  if (exact_) {
    p.stored_rows = stored_embed_tokens_.weight;
    p.stored_row_bytes = stored_embed_tokens_.row_bytes;
    return visit_dtype(stored_embed_tokens_.type,
                       [&]<DType T>() { launch(ctx.stream, how, embed_rows<T, true>, p); });
  }
  p.embed_tokens = embed_tokens_.parts[0];
  visit_packed(p.embed_tokens.type, [&]<DType T>() { launch(ctx.stream, how, embed_rows<T, false>, p); });
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

Epilogue PipelineStage::qkv_epilogue(int64_t layer) const {
  Epilogue e;
  e.pairs_per_head = static_cast<int32_t>(pairs_per_head(text_.head_dim));
  e.half = static_cast<int32_t>(text_.head_dim / 2);
  e.heads = static_cast<int32_t>(text_.num_attention_heads);
  e.head_dim = static_cast<int32_t>(padded_head_dim_);
  e.query_scale = kLog2E / std::sqrt(static_cast<float>(text_.head_dim));
  e.rotation = rotation_.as<float>();
  e.half_out = queries_.as<uint16_t>();
  e.rows = row_info_.as<RowInfo>();
  e.pages = pool_->layout();
  e.layer = static_cast<int32_t>(layer);
  return e;
}

int64_t PipelineStage::chunks_of(int64_t cells) {
  const int pages = ceil_div(static_cast<int>(cells), kPageCells);
  return ceil_div(pages, pages_per_chunk(pages));
}

void PipelineStage::attend_rows(int64_t layer, int64_t first_row, int64_t rows, int64_t chunks, bool single) {
  const int64_t heads = text_.num_attention_heads, kv_heads = text_.num_key_value_heads,
                group = heads / kv_heads;
  const auto stage = ctx.stage("text attention");
  DecodeAttention p{};
  p.queries = queries_.as<uint16_t>() + first_row * heads * padded_head_dim_;
  p.rows = row_info_.as<RowInfo>() + first_row;
  p.pages = pool_->layout();
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
    launch(ctx.stream, how, decode_attention<kHeadDim>, p);
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
void PipelineStage::layer_few(int64_t index, int64_t rows, int64_t chunks, bool single) {
  const Layer& l = layers_[index];
  const int64_t hidden = text_.hidden_size;
  float* x = x_.as<float>();
  const auto normed = [&](const float* weight) -> FewInput {
    if (rows <= kNormedRows) return {nullptr, x, weight, text_.rms_norm_eps};
    norm(ctx, x, weight, text_.rms_norm_eps, hidden, rows, normed_.as<uint16_t>(), nullptr,
         l.qkv_proj.stride);
    return {normed_.as<uint16_t>(), nullptr, nullptr, 0};
  };
  few_rows_linear(ctx, l.qkv_proj, normed(l.input_layernorm), rows, Finish::TextQkv, qkv_epilogue(index));
  attend_rows(index, 0, rows, chunks, single);
  few_rows_linear(ctx, l.o_proj, {attended_.as<uint16_t>(), nullptr, nullptr, 0}, rows, Finish::Residual,
                  residual(x_, hidden));
  Epilogue wide;
  wide.half_out = wide_.as<uint16_t>();
  wide.stride = l.down_proj.stride;
  wide.columns = static_cast<int32_t>(text_.intermediate_size);
  few_rows_linear(ctx, l.gate_up_proj, normed(l.post_attention_layernorm), rows, Finish::SwiGlu, wide);
  few_rows_linear(ctx, l.down_proj, {wide_.as<uint16_t>(), nullptr, nullptr, 0}, rows, Finish::Residual,
                  residual(x_, hidden));
}

// Qwen2VLDecoderLayer for many rows.
void PipelineStage::layer_many(int64_t index, std::span<const SequenceRows> batch, int64_t rows) {
  const Layer& l = layers_[index];
  const int64_t hidden = text_.hidden_size, heads = text_.num_attention_heads,
                kv_heads = text_.num_key_value_heads;
  float* x = x_.as<float>();
  norm(ctx, x, l.input_layernorm, text_.rms_norm_eps, hidden, rows, normed_.as<uint16_t>(), nullptr,
       l.qkv_proj.stride);
  many_rows_linear(ctx, l.qkv_proj, normed_.as<uint16_t>(), rows, Finish::TextQkv, qkv_epilogue(index),
                   expanded_);
  int64_t row = 0;
  for (size_t sequence = 0; sequence < batch.size(); ++sequence) {
    const SequenceRows& s = batch[sequence];
    if (s.n == 1) {
      attend_rows(index, row, 1, chunks_of(s.first_cell + 1), true);
    } else {
      const auto stage = ctx.stage("text attention",
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
      p.page_table = table(sequence);
      p.pages = pool_->layout();
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
          launch(ctx.stream, how, flash_attention<32, 1>, p);
          break;
        case 64:
          launch(ctx.stream, how, flash_attention<64, 1>, p);
          break;
        case 96:
          launch(ctx.stream, how, flash_attention<96, 1>, p);
          break;
        default:
          launch(ctx.stream, how, flash_attention<128, 1>, p);
      }
    }
    row += s.n;
  }
  many_rows_linear(ctx, l.o_proj, attended_.as<uint16_t>(), rows, Finish::Residual, residual(x_, hidden),
                   expanded_);
  norm(ctx, x, l.post_attention_layernorm, text_.rms_norm_eps, hidden, rows, normed_.as<uint16_t>(), nullptr,
       l.gate_up_proj.stride);
  Epilogue wide;
  wide.half_out = wide_.as<uint16_t>();
  wide.stride = l.down_proj.stride;
  wide.columns = static_cast<int32_t>(text_.intermediate_size);
  many_rows_linear(ctx, l.gate_up_proj, normed_.as<uint16_t>(), rows, Finish::SwiGlu, wide, expanded_);
  many_rows_linear(ctx, l.down_proj, wide_.as<uint16_t>(), rows, Finish::Residual, residual(x_, hidden),
                   expanded_);
}

// Qwen2VLDecoderLayer in float32, one plain kernel after another.
void PipelineStage::layer_plain(int64_t index, int64_t rows) {
  const Layer& l = layers_[index];
  const int64_t hidden = text_.hidden_size, wide = text_.intermediate_size, heads = text_.num_attention_heads;
  const int64_t kv_heads = text_.num_key_value_heads, stride = q_size_ + 2 * kv_size_;
  float *x = x_.as<float>(), *normed = float_normed_.as<float>(), *qkv = qkv_.as<float>();
  norm(ctx, x, l.input_layernorm, text_.rms_norm_eps, hidden, rows, nullptr, normed, hidden);
  plain_linear_rows(ctx, l.q, normed, hidden, rows, qkv, stride, false);
  plain_linear_rows(ctx, l.k, normed, hidden, rows, qkv + q_size_, stride, false);
  plain_linear_rows(ctx, l.v, normed, hidden, rows, qkv + q_size_ + kv_size_, stride, false);
  launch(ctx.stream, {"text rope", dim3(static_cast<unsigned>(rows)), 256}, plain_rotate,
         PlainRotate{qkv, stride, rotation_.as<float>(), static_cast<int32_t>(text_.head_dim / 2),
                     static_cast<int32_t>(heads + kv_heads), row_info_.as<RowInfo>(), pool_->layout(),
                     static_cast<int32_t>(index), static_cast<int32_t>(heads)});
  PlainAttention p{};
  p.queries = qkv;
  p.query_stride = stride;
  p.scale = 1.0f / std::sqrt(static_cast<float>(text_.head_dim));
  p.head_dim = static_cast<int32_t>(text_.head_dim);
  p.group = static_cast<int32_t>(heads / kv_heads);
  p.rows = row_info_.as<RowInfo>();
  p.pages = pool_->layout();
  p.layer = static_cast<int32_t>(index);
  p.out = float_attended_.as<float>();
  p.out_stride = q_size_;
  launch(ctx.stream, {"text attention", dim3(static_cast<unsigned>(rows), static_cast<unsigned>(heads)), 32},
         plain_attention, p);
  plain_linear_rows(ctx, l.o, float_attended_.as<float>(), q_size_, rows, x, hidden, true);
  norm(ctx, x, l.post_attention_layernorm, text_.rms_norm_eps, hidden, rows, nullptr, normed, hidden);
  plain_linear_rows(ctx, l.gate, normed, hidden, rows, gate_.as<float>(), wide, false);
  plain_linear_rows(ctx, l.up, normed, hidden, rows, up_.as<float>(), wide, false);
  launch(ctx.stream, {"text silu", dim3(blocks(rows * wide, 256)), 256}, plain_activation,
         Activate{Activation::SwiGlu, gate_.as<float>(), up_.as<float>(), rows * wide});
  plain_linear_rows(ctx, l.down, gate_.as<float>(), wide, rows, x, hidden, true);
}

/// Logits [rows][vocab] of rows of the residual stream.
void PipelineStage::head(const float* x, int64_t rows, float* logits) {
  const int64_t hidden = text_.hidden_size;
  if (exact_) {
    norm(ctx, x, norm_, text_.rms_norm_eps, hidden, rows, nullptr, float_normed_.as<float>(), hidden);
    return plain_linear_rows(ctx, stored_lm_head_.weight == nullptr ? stored_embed_tokens_ : stored_lm_head_,
                             float_normed_.as<float>(), hidden, rows, logits, text_.vocab_size, false);
  }
  const PackedLinear& linear = lm_head_.parts.empty() ? embed_tokens_ : lm_head_;
  Epilogue e;
  e.out = logits;
  e.stride = text_.vocab_size;
  e.columns = static_cast<int32_t>(text_.vocab_size);
  FewInput input{nullptr, x, norm_, text_.rms_norm_eps};
  if (rows > kNormedRows) {
    norm(ctx, x, norm_, text_.rms_norm_eps, hidden, rows, normed_.as<uint16_t>(), nullptr, linear.stride);
    input = {normed_.as<uint16_t>(), nullptr, nullptr, 0};
  }
  few_rows_linear(ctx, linear, input, rows, Finish::Store, e);
}

void PipelineStage::find_likeliest(int64_t rows, const float* logits, int32_t* tokens, bool advance) {
  launch(
      ctx.stream,
      {"likeliest token", dim3(kLikeliestParts, static_cast<unsigned>(rows)), kLikeliestThreads, 128, true},
      qwen2vl::cuda::find_likeliest,
      FindLikeliest{logits, text_.vocab_size, likeliest_parts_.as<Likeliest>(),
                    likeliest_arrived_.as<uint32_t>(), tokens, advance ? row_info_.as<RowInfo>() : nullptr});
}

int64_t PipelineStage::read_weights() {
  int64_t bytes = 0;
  const auto read = [&](const void* at, int64_t n) {
    launch(ctx.stream,
           {"read_memory", dim3(static_cast<unsigned>(8 * ctx.properties.multiProcessorCount)), 256},
           read_memory, static_cast<const uint4*>(at), n / 16, arrived_.as<uint32_t>());
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
  if (norm_ != nullptr) {  // of embeddings, decoding a token reads a row
    packed(lm_head_.parts.empty() ? embed_tokens_ : lm_head_);
    stored(stored_lm_head_.weight == nullptr ? stored_embed_tokens_ : stored_lm_head_);
  }
  ctx.synchronize();
  return bytes;
}

}  // namespace qwen2vl::cuda
