#include "cpu/vision_encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "quant/quantize.h"

namespace qwen2vl::cpu {
namespace {

// Rows that go through the row-wise stages together: their activations stay in cache, and the buffers of the
// wide layers do not grow with the picture.
constexpr int64_t kRows = 512;

template <typename Fn>
void for_chunks(int64_t rows, const Fn& fn) {
  for (int64_t begin = 0; begin < rows; begin += kRows) fn(begin, std::min(kRows, rows - begin));
}

void layer_norm_rows(Context& ctx, const NormWeights& norm, float eps, const float* x, int64_t rows,
                     int64_t width, float* out) {
  ctx.for_rows(rows, [&](int64_t r) {
    ctx.kernels.layer_norm(x + r * width, norm.weight.data(), norm.bias.data(), eps, width, out + r * width);
  });
}

void quick_gelu_rows(Context& ctx, float* x, int64_t rows, int64_t width) {
  const auto stage = ctx.profile.stage("image quick_gelu");
  ctx.for_rows(rows, [&](int64_t r) { ctx.kernels.quick_gelu(x + r * width, width); });
}

/// The convolution over (frames, patch, patch) is one matrix; GGUF keeps a slice per frame. Joins them so
/// that a row's order is pixel_values': channel, frame, row, column.
PackedLinear pack_patch_embed(const VisionConfig& c, const VisionWeights& weights, Context& ctx) {
  const int64_t plane = c.patch_size * c.patch_size, slice = c.in_channels * plane;
  std::vector<float> joined(c.embed_dim * c.patch_dim());
  std::vector<float> row(slice);
  std::vector<uint8_t> room;
  for (int64_t frame = 0; frame < c.temporal_patch_size; ++frame) {
    const MatrixView& w = weights.patch_embed[frame];
    const int64_t stride = row_bytes(w.type, slice);
    room.resize(c.embed_dim * stride);
    const uint8_t* stored = w.read_rows(0, c.embed_dim, room.data());
    for (int64_t d = 0; d < c.embed_dim; ++d) {
      dequantize_row(w.type, stored + d * stride, slice, row.data());
      for (int64_t channel = 0; channel < c.in_channels; ++channel)
        std::memcpy(joined.data() + d * c.patch_dim() + (channel * c.temporal_patch_size + frame) * plane,
                    row.data() + channel * plane, plane * sizeof(float));
    }
  }
  return pack_matrix(
      "image patch_embed",
      {DType::F32, c.embed_dim, c.patch_dim(), reinterpret_cast<const uint8_t*>(joined.data())}, ctx);
}

}  // namespace

/// A layer over the chunks of a picture: the center of the first serves all.
struct VisionEncoder::CenteredLinear {
  const PackedLinear& layer;
  std::optional<Center> center = {};

  void operator()(Context& ctx, const InputRows& x, float* out, int64_t out_stride, Store store) {
    if (!center) center = center_of(ctx, layer, x);
    linear(ctx, layer, x, out, out_stride, store, *center);
  }
};

VisionEncoder::VisionEncoder(const VisionConfig& config, const VisionWeights& w, Context& ctx,
                             const Progress& progress)
    : config_(config), attention_(config.num_heads, config.head_dim) {
  patch_embed_ = pack_patch_embed(config, w, ctx);
  for (const VisionBlockWeights& b : w.blocks) {
    blocks_.push_back({b.norm1, b.norm2, pack_linear("image qkv", {&b.q, &b.k, &b.v}, ctx, &b.norm1),
                       pack_linear("image proj", {&b.proj}, ctx),
                       pack_linear("image fc1", {&b.fc1}, ctx, &b.norm2),
                       pack_linear("image fc2", {&b.fc2}, ctx)});
    progress(static_cast<int64_t>(blocks_.size()), config.depth);
  }
  ln_q_ = w.ln_q;
  // A seventieth of the tower's work, and no later layer averages its errors away.
  mlp_0_ = pack_linear("image merger", {{&w.mlp_0, Inputs::Fine}}, ctx);
  mlp_2_ = pack_linear("image merger", {{&w.mlp_2, Inputs::Fine}}, ctx);
}

int64_t VisionEncoder::weight_bytes() const {
  int64_t bytes = patch_embed_.weight_bytes() + mlp_0_.weight_bytes() + mlp_2_.weight_bytes();
  for (const Block& b : blocks_)
    bytes += b.qkv.weight_bytes() + b.proj.weight_bytes() + b.fc1.weight_bytes() + b.fc2.weight_bytes();
  return bytes;
}

// Qwen2VisionTransformerPretrainedModel.forward
void VisionEncoder::operator()(Context& ctx, const float* pixel_values, const GridTHW& grid, float* out,
                               const Progress& progress) {
  const int64_t step_rows = grid.h * grid.w, rows = grid.t * step_rows, width = config_.embed_dim;
  float* x = x_.resize(rows * width);
  float* qkv = qkv_.resize(rows * 3 * width);
  float* normed = normed_.resize(std::min(kRows, rows) * width);

  const Rotation turned = rotation(grid);
  linear(ctx, patch_embed_, {pixel_values, rows, config_.patch_dim()}, x, width, Store::Overwrite);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    progress(static_cast<int64_t>(i), config_.depth);
    const Block& block = blocks_[i];
    CenteredLinear qkv_layer{block.qkv}, proj{block.proj}, fc1{block.fc1}, fc2{block.fc2};
    for_chunks(rows, [&](int64_t row, int64_t n) {
      layer_norm_rows(ctx, block.norm1, config_.layer_norm_eps, x + row * width, n, width, normed);
      qkv_layer(ctx, {normed, n, width}, qkv + row * 3 * width, 3 * width, Store::Overwrite);
    });
    for (int64_t t = 0; t < grid.t; ++t) attention_(ctx, qkv + t * step_rows * 3 * width, step_rows, turned);
    for_chunks(rows, [&](int64_t row, int64_t n) {
      proj(ctx, {qkv + row * 3 * width, n, 3 * width}, x + row * width, width, Store::Accumulate);
      mlp(ctx, block.norm2, fc1, fc2, x + row * width, n);
    });
  }
  merge(ctx, x, rows, out);
  // A tenth of a gigabyte for a photo, needed again when the next one comes: the cache of a long context can
  // have it.
  for (FloatBuffer* buffer : {&x_, &qkv_, &normed_, &wide_}) buffer->release();
  attention_.release_buffers();
  progress(config_.depth, config_.depth);
}

// VisionRotaryEmbedding: head_dim / 4 frequencies turn with the row, the same with the column.
Rotation VisionEncoder::rotation(const GridTHW& grid) const {
  const int64_t half = config_.head_dim / 2, quarter = config_.head_dim / 4;
  const auto positions = patch_positions(grid, config_.spatial_merge_size);
  std::vector<float> inv_freq(quarter);
  for (int64_t i = 0; i < quarter; ++i)
    inv_freq[i] =
        static_cast<float>(1.0 / std::pow(10000.0, static_cast<double>(2 * i) / static_cast<double>(half)));
  const int64_t step_rows = grid.h * grid.w;
  Rotation rotation{std::vector<float>(step_rows * half), std::vector<float>(step_rows * half)};
  for (int64_t r = 0; r < step_rows; ++r)
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions[r][i / quarter]) * inv_freq[i % quarter];
      rotation.cos[r * half + i] = std::cos(angle);
      rotation.sin[r * half + i] = std::sin(angle);
    }
  return rotation;
}

// Qwen2VLVisionBlock: x += fc2(quick_gelu(fc1(norm2(x))))
void VisionEncoder::mlp(Context& ctx, const NormWeights& norm2, CenteredLinear& fc1, CenteredLinear& fc2,
                        float* x, int64_t rows) {
  const int64_t width = config_.embed_dim, wide_size = config_.intermediate_size;
  float* normed = normed_.resize(rows * width);
  float* wide = wide_.resize(rows * wide_size);
  layer_norm_rows(ctx, norm2, config_.layer_norm_eps, x, rows, width, normed);
  fc1(ctx, {normed, rows, width}, wide, wide_size, Store::Overwrite);
  quick_gelu_rows(ctx, wide, rows, wide_size);
  fc2(ctx, {wide, rows, wide_size}, x, width, Store::Accumulate);
}

// PatchMerger: neighbouring patches are neighbouring rows, so concatenating them is a change of shape.
void VisionEncoder::merge(Context& ctx, const float* x, int64_t rows, float* out) {
  const int64_t width = config_.embed_dim, unit = config_.merge_unit(), merged = unit * width;
  for_chunks(rows / unit, [&](int64_t row, int64_t n) {
    float* normed = normed_.resize(n * merged);
    float* wide = wide_.resize(n * merged);
    layer_norm_rows(ctx, ln_q_, config_.layer_norm_eps, x + row * merged, n * unit, width, normed);
    linear(ctx, mlp_0_, {normed, n, merged}, wide, merged, Store::Overwrite);
    ctx.for_rows(n, [&](int64_t r) { ctx.kernels.gelu(wide + r * merged, merged); });
    linear(ctx, mlp_2_, {wide, n, merged}, out + row * config_.hidden_size, config_.hidden_size,
           Store::Overwrite);
  });
}

}  // namespace qwen2vl::cpu
