#include "cpu/vision_encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "model/pixels.h"
#include "quant/quantize.h"

namespace qwen2vl::cpu {
namespace {

constexpr double kRopeTheta = 10000;  // of transformers' VisionRotaryEmbedding: no file says it

// Rows that go through the row-wise stages together: their activations stay in cache, the buffers of the
// wide layers do not grow with the image, and a piece of work takes a few hundredths of a second.
constexpr int64_t kRows = 512;

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
      {DType::F32, c.embed_dim, c.patch_dim(), reinterpret_cast<const uint8_t*>(joined.data())}, ctx,
      Inputs::Groups, weights.patch_embed_update);
}

}  // namespace

/// A layer over the chunks of an image: the center of the first serves all.
struct VisionEncoder::CenteredLinear {
  const PackedLinear& layer;
  std::optional<Center> center = {};

  void operator()(Context& ctx, const InputRows& x, float* out, int64_t out_stride, Store store) {
    if (!center) center = center_of(ctx, layer, x);
    linear(ctx, layer, x, out, out_stride, store, *center);
  }
};

/// Of one image on its way.
struct VisionEncoder::Buffers {
  FloatBuffer x;       ///< [patches][embed_dim], the residual stream
  FloatBuffer qkv;     ///< [patches][3 embed_dim]
  FloatBuffer normed;  ///< [kRows][embed_dim]
  FloatBuffer wide;    ///< [kRows][intermediate_size]
};

bool VisionEncoder::pack_next(const VisionWeights& w, Context& ctx) {
  if (blocks_.size() < w.blocks.size()) {
    const VisionBlockWeights& b = w.blocks[blocks_.size()];
    blocks_.push_back({b.norm1, b.norm2, pack_linear("image qkv", {&b.q, &b.k, &b.v}, ctx, &b.norm1),
                       pack_linear("image proj", {&b.proj}, ctx),
                       pack_linear("image fc1", {&b.fc1}, ctx, &b.norm2),
                       pack_linear("image fc2", {&b.fc2}, ctx)});
    return false;
  }
  patch_embed_ = pack_patch_embed(config_, w, ctx);
  ln_q_ = w.ln_q;
  // A seventieth of the tower's work, and no later layer averages its errors away.
  mlp_0_ = pack_linear("image merger", {{&w.mlp_0, {Inputs::Fine}}}, ctx);
  mlp_2_ = pack_linear("image merger", {{&w.mlp_2, {Inputs::Fine}}}, ctx);
  return true;
}

int64_t VisionEncoder::weight_bytes() const {
  int64_t bytes = patch_embed_.weight_bytes() + mlp_0_.weight_bytes() + mlp_2_.weight_bytes();
  for (const Block& b : blocks_)
    bytes += b.qkv.weight_bytes() + b.proj.weight_bytes() + b.fc1.weight_bytes() + b.fc2.weight_bytes();
  return bytes;
}

// Qwen2VisionTransformerPretrainedModel.forward
Pieces VisionEncoder::operator()(Context& ctx, VisionInput input, float* out) const {
  const GridTHW grid = input.grid;
  const int64_t step_rows = grid.h * grid.w, rows = grid.t * step_rows, width = config_.embed_dim;
  Buffers b;
  float* x = b.x.resize(rows * width);
  float* qkv = b.qkv.resize(rows * 3 * width);
  // Where nothing else is rounded to 8 bits, they would be the largest error.
  using ValueBits = FullAttention::ValueBits;
  const bool quantized = std::any_of(blocks_.begin(), blocks_.end(), [](const Block& block) {
    return is_quantized(block.qkv.parts.front().matrix.type);
  });
  FullAttention attention(config_.num_heads, config_.head_dim,
                          quantized ? ValueBits::Eight : ValueBits::Sixteen);

  const Rotation turned = rotation(grid);
  for (int64_t row = 0; row < rows; row += kRows) {
    embed(ctx, input, row, std::min(kRows, rows - row), b);
    co_yield 0;
  }
  for (int64_t i = 0; i < config_.depth; ++i) {
    const Block& block = blocks_[i];
    CenteredLinear qkv_layer{block.qkv}, proj{block.proj}, fc1{block.fc1}, fc2{block.fc2};
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t n = std::min(kRows, rows - row);
      float* normed = b.normed.resize(n * width);
      layer_norm_rows(ctx, block.norm1, config_.layer_norm_eps, x + row * width, n, width, normed);
      qkv_layer(ctx, {normed, n, width}, qkv + row * 3 * width, 3 * width, Store::Overwrite);
      co_yield i;
    }
    for (int64_t t = 0; t < grid.t; ++t)
      for (Pieces work = attention(ctx, qkv + t * step_rows * 3 * width, step_rows, turned); work.next();)
        co_yield i;
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t n = std::min(kRows, rows - row);
      proj(ctx, {qkv + row * 3 * width, n, 3 * width}, x + row * width, width, Store::Accumulate);
      mlp(ctx, block.norm2, fc1, fc2, x + row * width, n, b);
      co_yield i;
    }
  }
  const int64_t whole = kRows / config_.merge_unit() * config_.merge_unit();
  for (int64_t row = 0; row < rows; row += whole) {
    merge(ctx, row, std::min(whole, rows - row), b, out);
    co_yield config_.depth - 1;
  }
}

// PatchEmbed: a convolution whose patches do not overlap.
void VisionEncoder::embed(Context& ctx, const VisionInput& input, int64_t row, int64_t n, Buffers& b) const {
  const int64_t width = config_.embed_dim, patch = config_.patch_dim();
  const float* patches = nullptr;
  if (input.pixel_values != nullptr) {
    patches = input.pixel_values + row * patch;
  } else {
    float* made = b.wide.resize(n * patch);
    pixel_values(input.pixels, input.levels, input.grid, config_, row, n, made);
    patches = made;
  }
  linear(ctx, patch_embed_, {patches, n, patch}, b.x.data() + row * width, width, Store::Overwrite);
}

// VisionRotaryEmbedding: head_dim / 4 frequencies turn with the row, the same with the column.
Rotation VisionEncoder::rotation(const GridTHW& grid) const {
  const int64_t half = config_.head_dim / 2, quarter = config_.head_dim / 4;
  std::vector<float> inv_freq(quarter);
  for (int64_t i = 0; i < quarter; ++i)
    inv_freq[i] = static_cast<float>(
        1.0 / std::pow(kRopeTheta, static_cast<double>(2 * i) / static_cast<double>(half)));
  const int64_t step_rows = grid.h * grid.w;
  Rotation rotation{std::vector<float>(step_rows * half), std::vector<float>(step_rows * half)};
  for (int64_t r = 0; r < step_rows; ++r) {
    const auto position = patch_position(grid, config_.spatial_merge_size, r);
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position[i / quarter]) * inv_freq[i % quarter];
      rotation.cos[r * half + i] = std::cos(angle);
      rotation.sin[r * half + i] = std::sin(angle);
    }
  }
  return rotation;
}

// Qwen2VLVisionBlock: x += fc2(quick_gelu(fc1(norm2(x))))
void VisionEncoder::mlp(Context& ctx, const NormWeights& norm2, CenteredLinear& fc1, CenteredLinear& fc2,
                        float* x, int64_t rows, Buffers& b) const {
  const int64_t width = config_.embed_dim, wide_size = config_.intermediate_size;
  float* normed = b.normed.resize(rows * width);
  float* wide = b.wide.resize(rows * wide_size);
  layer_norm_rows(ctx, norm2, config_.layer_norm_eps, x, rows, width, normed);
  fc1(ctx, {normed, rows, width}, wide, wide_size, Store::Overwrite);
  quick_gelu_rows(ctx, wide, rows, wide_size);
  fc2(ctx, {wide, rows, wide_size}, x, width, Store::Accumulate);
}

// PatchMerger: neighbouring patches are neighbouring rows, so concatenating them is a change of shape.
void VisionEncoder::merge(Context& ctx, int64_t row, int64_t n, Buffers& b, float* out) const {
  const int64_t width = config_.embed_dim, unit = config_.merge_unit(), merged = unit * width;
  const int64_t hidden = config_.hidden_size;
  float* normed = b.normed.resize(n * width);
  float* wide = b.wide.resize(n * width);
  layer_norm_rows(ctx, ln_q_, config_.layer_norm_eps, b.x.data() + row * width, n, width, normed);
  linear(ctx, mlp_0_, {normed, n / unit, merged}, wide, merged, Store::Overwrite);
  ctx.for_rows(n / unit, [&](int64_t r) { ctx.kernels.gelu(wide + r * merged, merged); });
  linear(ctx, mlp_2_, {wide, n / unit, merged}, out + row / unit * hidden, hidden, Store::Overwrite);
}

}  // namespace qwen2vl::cpu
