#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/kernels/flash_attention.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/plain.cuh"
#include "cuda/kernels/step.cuh"
#include "cuda/kernels/vision.cuh"
#include "cuda/vision_encoder.h"
#include "cuda/wgmma.h"
#include "quant/quantize.h"

namespace qwen2vl::cuda {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr double kRopeTheta = 10000;  // VisionRotaryEmbedding's; no file says it

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

int64_t padded(int64_t head_dim) {
  for (int64_t size : {32, 64, 80, 96, 128})
    if (head_dim <= size) return size;
  throw UnsupportedError("the CUDA backend's vision tower takes a head_dim of 128 at most, found " +
                         std::to_string(head_dim));
}

/// The convolution over (frames, patch, patch) as one matrix whose columns are in pixel_values' order:
/// channel, frame, row, column. GGUF keeps a slice per frame.
std::vector<float> join_patch_embed(const qwen2vl_vision& c) {
  const int64_t plane = c.patch_size * c.patch_size, slice = c.in_channels * plane;
  const int64_t patch_dim = slice * c.temporal_patch_size;
  std::vector<float> joined(static_cast<size_t>(c.embed_dim * patch_dim)), row(static_cast<size_t>(slice));
  for (int64_t frame = 0; frame < c.temporal_patch_size; ++frame) {
    const qwen2vl_matrix& w = c.patch_embed[frame];
    const DType type = static_cast<DType>(w.type);
    for (int64_t d = 0; d < c.embed_dim; ++d) {
      dequantize_row(type, w.data + d * row_bytes(type, slice), slice, row.data());
      for (int64_t channel = 0; channel < c.in_channels; ++channel)
        std::memcpy(joined.data() + d * patch_dim + (channel * c.temporal_patch_size + frame) * plane,
                    row.data() + channel * plane, static_cast<size_t>(plane) * sizeof(float));
    }
  }
  return joined;
}

}  // namespace

VisionEncoder::VisionEncoder(Context& ctx, const qwen2vl_vision& vision, bool exact, const Report& report)
    : ctx_(ctx), vision_(vision), exact_(exact) {
  if (vision.head_dim > 256)
    throw UnsupportedError("the CUDA backend's vision tower takes a head_dim of 256 at most, found " +
                           std::to_string(vision.head_dim));
  padded_head_dim_ = exact ? vision.head_dim : padded(vision.head_dim);
  PackingBuffers buffers;
  const auto vector = [&](const qwen2vl_vector& v) { return store_floats(ctx, v.data, v.size); };
  const int64_t patch_dim =
      vision.in_channels * vision.temporal_patch_size * vision.patch_size * vision.patch_size;
  const std::vector<float> joined = join_patch_embed(vision);
  const qwen2vl_linear patch_embed{{static_cast<uint32_t>(DType::F32), vision.embed_dim, patch_dim,
                                    reinterpret_cast<const uint8_t*>(joined.data())},
                                   {nullptr, 0}};
  if (exact)
    stored_patch_embed_ = store(ctx, "image patch_embed", patch_embed);
  else
    patch_embed_ = pack(ctx, "image patch_embed", neighbouring(patch_embed), buffers);
  for (int64_t i = 0; i < vision.depth; ++i) {
    const qwen2vl_vision_block& w = vision.blocks[i];
    Block block{};
    block.norm1_weight = vector(w.norm1.weight);
    block.norm1_bias = vector(w.norm1.bias);
    block.norm2_weight = vector(w.norm2.weight);
    block.norm2_bias = vector(w.norm2.bias);
    if (exact) {
      block.q = store(ctx, "image qkv", w.q);
      block.k = store(ctx, "image qkv", w.k);
      block.v = store(ctx, "image qkv", w.v);
      block.stored_proj = store(ctx, "image proj", w.proj);
      block.stored_fc1 = store(ctx, "image fc1", w.fc1);
      block.stored_fc2 = store(ctx, "image fc2", w.fc2);
    } else {
      Pairs qkv;
      for (const qwen2vl_linear* part : {&w.q, &w.k, &w.v})
        append_heads(qkv, *part, vision.num_heads, vision.head_dim);
      block.qkv = pack(ctx, "image qkv", qkv, buffers);
      block.proj = pack(ctx, "image proj", neighbouring(w.proj), buffers);
      block.fc1 = pack(ctx, "image fc1", neighbouring(w.fc1), buffers);
      block.fc2 = pack(ctx, "image fc2", neighbouring(w.fc2), buffers);
    }
    blocks_.push_back(std::move(block));
    report(i + 1, vision.depth);
  }
  ln_q_weight_ = vector(vision.ln_q.weight);
  ln_q_bias_ = vector(vision.ln_q.bias);
  if (exact) {
    stored_mlp_0_ = store(ctx, "image merger", vision.mlp_0);
    stored_mlp_2_ = store(ctx, "image merger", vision.mlp_2);
  } else {
    mlp_0_ = pack(ctx, "image merger", neighbouring(vision.mlp_0), buffers);
    mlp_2_ = pack(ctx, "image merger", neighbouring(vision.mlp_2), buffers);
  }
  std::vector<float> inv_freq;
  const int64_t half = vision.head_dim / 2;
  for (int64_t i = 0; i < vision.head_dim / 4; ++i)
    inv_freq.push_back(static_cast<float>(
        1.0 / std::pow(kRopeTheta, static_cast<double>(2 * i) / static_cast<double>(half))));
  inv_freq_ = store_floats(ctx, inv_freq.data(), static_cast<int64_t>(inv_freq.size()));
}

// Qwen2VisionTransformerPretrainedModel.forward
void VisionEncoder::operator()(const VisionInput& input, float* out, const Report& report) {
  const qwen2vl_vision& c = vision_;
  const Grid& grid = input.grid;
  const int64_t rows = grid.t * grid.h * grid.w, half = c.head_dim / 2;
  const int64_t tokens = rows / (c.spatial_merge_size * c.spatial_merge_size);
  x_.resize(rows * c.embed_dim * 4);
  rotation_.resize(rows * 2 * half * 4);
  out_.resize(tokens * c.hidden_size * 4);
  {
    const auto stage = ctx_.stage("image rope");
    launch(ctx_.stream, {"image rope", dim3(blocks(rows * half, 256)), 256}, vision_rotation,
           VisionRotation{static_cast<int32_t>(grid.h), static_cast<int32_t>(grid.w),
                          static_cast<int32_t>(c.spatial_merge_size), static_cast<int32_t>(c.head_dim / 4),
                          inv_freq_, rotation_.as<float>(), rows});
  }
  exact_ ? encode_plain(input, report) : encode(input, report);
  ctx_.copy_to_host(out, out_.as(), tokens * c.hidden_size * 4);
  constexpr int64_t kKept = int64_t{512} << 20;  // a photo's buffers stay: the next one needs no allocation
  int64_t held = 0;
  for (const DeviceBuffer* buffer :
       {&pixels_, &x_, &rotation_, &normed_, &qkv_, &attended_, &wide_, &expanded_})
    held += buffer->bytes();
  if (held > kKept)
    for (DeviceBuffer* buffer : {&pixels_, &x_, &rotation_, &normed_, &qkv_, &attended_, &wide_, &expanded_})
      buffer->release();
  report(c.depth, c.depth);
}

/// The patches' values, as bf16 or float32 rows.
void VisionEncoder::upload(const VisionInput& input, uint16_t* half_out, float* out, int64_t stride) {
  const qwen2vl_vision& c = vision_;
  const Grid& grid = input.grid;
  const int64_t rows = grid.t * grid.h * grid.w;
  const int64_t patch_dim = c.in_channels * c.temporal_patch_size * c.patch_size * c.patch_size;
  const auto stage = ctx_.stage("image pixels");
  if (input.pixels == nullptr) {
    pixels_.resize(rows * patch_dim * 4);
    ctx_.copy_to_device(out != nullptr ? out : pixels_.as<float>(), input.pixel_values, rows * patch_dim * 4);
    if (half_out != nullptr)
      launch(ctx_.stream, {"rows_to_bf16", dim3(static_cast<unsigned>(rows)), 256}, rows_to_bf16,
             ToBf16{pixels_.as<float>(), patch_dim, half_out, stride});
    return;
  }
  const int64_t bytes = rows * c.patch_size * c.patch_size * c.in_channels, levels = c.in_channels * 256 * 4;
  pixels_.resize(levels + bytes);
  ctx_.copy_to_device(pixels_.as(), input.levels, levels);
  ctx_.copy_to_device(pixels_.as() + levels, input.pixels, bytes);
  launch(ctx_.stream, {"pixel_rows", dim3(static_cast<unsigned>(rows)), 256}, pixel_rows,
         PixelRows{pixels_.as() + levels, pixels_.as<float>(), static_cast<int32_t>(grid.w),
                   static_cast<int32_t>(c.spatial_merge_size), static_cast<int32_t>(c.patch_size),
                   static_cast<int32_t>(c.in_channels), static_cast<int32_t>(c.temporal_patch_size), stride,
                   half_out, out});
}

void VisionEncoder::norm(const float* x, const float* weight, const float* bias, int64_t rows,
                         uint16_t* half_out, float* out, int64_t stride) {
  qwen2vl::cuda::norm(ctx_, "image norm",
                      {x, weight, bias, vision_.layer_norm_eps, static_cast<int32_t>(vision_.embed_dim),
                       static_cast<int32_t>(rows), half_out, out, stride});
}

void VisionEncoder::encode(const VisionInput& input, const Report& report) {
  const qwen2vl_vision& c = vision_;
  const Grid& grid = input.grid;
  const int64_t rows = grid.t * grid.h * grid.w, width = c.embed_dim;
  const int64_t unit = c.spatial_merge_size * c.spatial_merge_size, merged = unit * width;
  const Block& first = blocks_.front();
  const auto zeroed = [&](DeviceBuffer& buffer, int64_t bytes) {  // what fills rows up has to be zero
    buffer.resize(bytes);
    check(cudaMemsetAsync(buffer.as(), 0, static_cast<size_t>(bytes), ctx_.stream), "cudaMemset");
    return buffer.as<uint16_t>();
  };
  const int64_t widest =
      std::max({patch_embed_.stride * rows, first.fc2.stride * rows, mlp_2_.stride * rows / unit});
  uint16_t* normed = zeroed(normed_, std::max(first.qkv.stride * rows, mlp_0_.stride * rows / unit) * 2);
  uint16_t* attended = zeroed(attended_, first.proj.stride * rows * 2);
  uint16_t* wide = zeroed(wide_, widest * 2);
  transposed_stride_ = ctx_.has_wgmma && padded_head_dim_ == 80 && c.head_dim == 80 ? (rows + 7) / 8 * 8 : 0;
  uint16_t* qkv =
      zeroed(qkv_, (2 * rows + std::max(rows, transposed_stride_)) * c.num_heads * padded_head_dim_ * 2);
  float* x = x_.as<float>();
  Epilogue residual;
  residual.out = x;
  residual.stride = width;
  residual.columns = static_cast<int32_t>(width);
  const auto half_rows = [](uint16_t* to, int64_t stride, int64_t columns) {
    Epilogue e;
    e.half_out = to;
    e.stride = stride;
    e.columns = static_cast<int32_t>(columns);
    return e;
  };
  Epilogue heads = half_rows(qkv, 0, 0);
  heads.pairs_per_head = static_cast<int32_t>(pairs_per_head(c.head_dim));
  heads.half = static_cast<int32_t>(c.head_dim / 2);
  heads.heads = static_cast<int32_t>(c.num_heads);
  heads.head_dim = static_cast<int32_t>(padded_head_dim_);
  heads.query_scale = kLog2E / std::sqrt(static_cast<float>(c.head_dim));
  heads.rotation = rotation_.as<float>();
  heads.half_rows = rows;
  heads.transposed_stride = transposed_stride_;

  upload(input, wide, nullptr, patch_embed_.stride);
  many_rows_linear(ctx_, patch_embed_, wide, rows, Finish::Store, residual, expanded_);
  check(cudaMemsetAsync(wide, 0, static_cast<size_t>(widest * 2), ctx_.stream),
        "cudaMemset");  // another stride
  for (size_t i = 0; i < blocks_.size(); ++i) {
    report(static_cast<int64_t>(i), c.depth);
    const Block& b = blocks_[i];
    // Qwen2VLVisionBlock: x += proj(attn(norm1(x))); x += fc2(quick_gelu(fc1(norm2(x))))
    norm(x, b.norm1_weight, b.norm1_bias, rows, normed, nullptr, b.qkv.stride);
    many_rows_linear(ctx_, b.qkv, normed, rows, Finish::VisionQkv, heads, expanded_);
    attend(grid);
    many_rows_linear(ctx_, b.proj, attended, rows, Finish::Residual, residual, expanded_);
    norm(x, b.norm2_weight, b.norm2_bias, rows, normed, nullptr, b.fc1.stride);
    many_rows_linear(ctx_, b.fc1, normed, rows, Finish::QuickGelu,
                     half_rows(wide, b.fc2.stride, c.intermediate_size), expanded_);
    many_rows_linear(ctx_, b.fc2, wide, rows, Finish::Residual, residual, expanded_);
  }
  // PatchMerger: neighbouring patches are neighbouring rows, so concatenating them is a change of shape,
  // where the rows are not filled up; else each norm row is moved to its place.
  const int64_t tokens = rows / unit;
  check(cudaMemsetAsync(normed, 0, static_cast<size_t>(mlp_0_.stride * tokens * 2), ctx_.stream),
        "cudaMemset");
  if (mlp_0_.stride == merged) {
    norm(x, ln_q_weight_, ln_q_bias_, rows, normed, nullptr, width);
  } else {
    norm(x, ln_q_weight_, ln_q_bias_, rows, wide, nullptr, width);
    check(cudaMemcpy2DAsync(normed, static_cast<size_t>(mlp_0_.stride) * 2, wide,
                            static_cast<size_t>(merged) * 2, static_cast<size_t>(merged) * 2,
                            static_cast<size_t>(tokens), cudaMemcpyDeviceToDevice, ctx_.stream),
          "copying rows");
  }
  check(cudaMemsetAsync(wide, 0, static_cast<size_t>(mlp_2_.stride * tokens * 2), ctx_.stream), "cudaMemset");
  many_rows_linear(ctx_, mlp_0_, normed, tokens, Finish::Gelu, half_rows(wide, mlp_2_.stride, merged),
                   expanded_);
  Epilogue out;
  out.out = out_.as<float>();
  out.stride = c.hidden_size;
  out.columns = static_cast<int32_t>(c.hidden_size);
  many_rows_linear(ctx_, mlp_2_, wide, tokens, Finish::Store, out, expanded_);
}

void VisionEncoder::attend(const Grid& grid) {
  const qwen2vl_vision& c = vision_;
  const int64_t step_rows = grid.h * grid.w, rows = grid.t * step_rows;
  const double work = 4.0 * static_cast<double>(grid.t) * static_cast<double>(step_rows) *
                      static_cast<double>(step_rows) * static_cast<double>(c.embed_dim);
  const auto stage = ctx_.stage("image attention", {0, work, 0});
  const int64_t part = c.num_heads * rows * padded_head_dim_;
  FlashAttention p{};
  p.queries = qkv_.as<uint16_t>();
  p.query_row_stride = padded_head_dim_;
  p.query_head_stride = rows * padded_head_dim_;
  p.rows = static_cast<int32_t>(step_rows);
  p.cells = static_cast<int32_t>(step_rows);
  p.keys = p.queries + part;
  p.values = p.queries + 2 * part;
  p.transposed_values = transposed_stride_ > 0 ? p.values : nullptr;
  p.transposed_stride = transposed_stride_;
  p.key_head_stride = rows * padded_head_dim_;
  p.group = 1;
  p.first_cell = -1;
  p.out = attended_.as<uint16_t>();
  p.stride = blocks_.front().proj.stride;
  p.true_head_dim = static_cast<int32_t>(c.head_dim);
  if (ctx_.has_wgmma && wgmma_attention(ctx_, p, padded_head_dim_, c.num_heads, grid.t)) return;
  const bool wide = padded_head_dim_ > 80;  // a warp's 32 queries then do not fit its registers
  const Launch how{"image attention",
                   dim3(blocks(step_rows, wide ? 64 : 128), static_cast<unsigned>(c.num_heads),
                        static_cast<unsigned>(grid.t)),
                   kFlashThreads, flash_shared_bytes(static_cast<int>(padded_head_dim_), wide ? 1 : 2)};
  switch (padded_head_dim_) {
    case 32:
      return launch(ctx_.stream, how, flash_attention<32, 2>, p);
    case 64:
      return launch(ctx_.stream, how, flash_attention<64, 2>, p);
    case 80:
      return launch(ctx_.stream, how, flash_attention<80, 2>, p);
    case 96:
      return launch(ctx_.stream, how, flash_attention<96, 1>, p);
    default:
      return launch(ctx_.stream, how, flash_attention<128, 1>, p);
  }
}

void VisionEncoder::encode_plain(const VisionInput& input, const Report& report) {
  const qwen2vl_vision& c = vision_;
  const Grid& grid = input.grid;
  const int64_t step_rows = grid.h * grid.w, rows = grid.t * step_rows, width = c.embed_dim;
  const int64_t unit = c.spatial_merge_size * c.spatial_merge_size, merged = unit * width;
  normed_.resize(rows * width * 4);
  qkv_.resize(rows * 3 * width * 4);
  attended_.resize(rows * width * 4);
  wide_.resize(rows * std::max({c.intermediate_size, width, stored_patch_embed_.cols}) * 4);
  float *x = x_.as<float>(), *normed = normed_.as<float>(), *qkv = qkv_.as<float>(),
        *wide = wide_.as<float>();
  const auto activate = [&](Activation what, int64_t count) {
    launch(ctx_.stream, {"image activation", dim3(blocks(count, 256)), 256}, plain_activation,
           Activate{what, wide, nullptr, count});
  };
  upload(input, nullptr, wide, stored_patch_embed_.cols);
  plain_linear_rows(ctx_, stored_patch_embed_, wide, stored_patch_embed_.cols, rows, x, width, false);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    report(static_cast<int64_t>(i), c.depth);
    const Block& b = blocks_[i];
    norm(x, b.norm1_weight, b.norm1_bias, rows, nullptr, normed, width);
    plain_linear_rows(ctx_, b.q, normed, width, rows, qkv, 3 * width, false);
    plain_linear_rows(ctx_, b.k, normed, width, rows, qkv + width, 3 * width, false);
    plain_linear_rows(ctx_, b.v, normed, width, rows, qkv + 2 * width, 3 * width, false);
    PlainRotate turn{};
    turn.x = qkv;
    turn.stride = 3 * width;
    turn.rotation = rotation_.as<float>();
    turn.half = static_cast<int32_t>(c.head_dim / 2);
    turn.rotated = static_cast<int32_t>(2 * c.num_heads);
    launch(ctx_.stream, {"image rope", dim3(static_cast<unsigned>(rows)), 256}, plain_rotate, turn);
    for (int64_t t = 0; t < grid.t; ++t) {
      PlainAttention p{};
      p.queries = qkv + t * step_rows * 3 * width;
      p.query_stride = 3 * width;
      p.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
      p.head_dim = static_cast<int32_t>(c.head_dim);
      p.group = 1;
      p.keys = p.queries + width;
      p.values = p.queries + 2 * width;
      p.kv_stride = 3 * width;
      p.cells = static_cast<int32_t>(step_rows);
      p.out = attended_.as<float>() + t * step_rows * width;
      p.out_stride = width;
      launch(
          ctx_.stream,
          {"image attention", dim3(static_cast<unsigned>(step_rows), static_cast<unsigned>(c.num_heads)), 32},
          plain_attention, p);
    }
    plain_linear_rows(ctx_, b.stored_proj, attended_.as<float>(), width, rows, x, width, true);
    norm(x, b.norm2_weight, b.norm2_bias, rows, nullptr, normed, width);
    plain_linear_rows(ctx_, b.stored_fc1, normed, width, rows, wide, c.intermediate_size, false);
    activate(Activation::QuickGelu, rows * c.intermediate_size);
    plain_linear_rows(ctx_, b.stored_fc2, wide, c.intermediate_size, rows, x, width, true);
  }
  norm(x, ln_q_weight_, ln_q_bias_, rows, nullptr, normed, width);
  plain_linear_rows(ctx_, stored_mlp_0_, normed, merged, rows / unit, wide, merged, false);
  activate(Activation::Gelu, rows / unit * merged);
  plain_linear_rows(ctx_, stored_mlp_2_, wide, merged, rows / unit, out_.as<float>(), c.hidden_size, false);
}

}  // namespace qwen2vl::cuda
