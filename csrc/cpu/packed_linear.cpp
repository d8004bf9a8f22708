#include "cpu/packed_linear.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/half.h"
#include "cpu/outliers.h"
#include "quant/formats.h"

namespace qwen2vl::cpu {
namespace {

// Of a file that are read at a time: they stay in a core's cache until they are packed.
constexpr int64_t kBytesPerRead = 256 << 10;

PackedMatrix pack(const MatrixView& source, Context& ctx) {
  PackedMatrix packed;
  packed.matrix = {source.type, source.rows,       source.cols, panel_parts(source.type, source.cols).bytes,
                   nullptr,     ctx.kernels.layout};
  packed.storage = AlignedBuffer(packed.matrix.panel_count() * packed.matrix.panel_bytes);
  uint8_t* out = packed.storage.data();
  packed.matrix.data = out;
  const int64_t source_bytes = kPanelRows * row_bytes(source.type, source.cols);  // of a panel
  const int64_t panels = std::max<int64_t>(1, kBytesPerRead / source_bytes);
  ctx.scratch.reserve_kernel(panels * source_bytes);
  ctx.pool.parallel_for(packed.matrix.panel_count(), panels, [&](int64_t begin, int64_t end, int thread) {
    const int64_t rows = std::min(end * kPanelRows, source.rows) - begin * kPanelRows;
    const uint8_t* read =
        source.read_rows(begin * kPanelRows, rows, ctx.scratch.threads[thread].kernel.data());
    for (int64_t p = begin; p < end; ++p)
      pack_panel(packed.matrix, read, rows, p - begin, out + p * packed.matrix.panel_bytes);
  });
  return packed;
}

int exponent(std::span<const float> values) {
  float largest = 0;
  for (const float value : values) largest = std::max(largest, std::fabs(value));
  return largest > 0 ? std::ilogb(largest) : 0;
}

Vector scaled(std::span<const float> values, int by) {
  Vector result;
  for (const float value : values) result.push_back(std::ldexp(value, by));
  return result;
}

/// In float32, or f16.
PackedMatrix pack_factor(const Vector& values, int64_t rows, int64_t cols, Context& ctx) {
  if (ctx.precision == Precision::Exact)
    return pack({DType::F32, rows, cols, reinterpret_cast<const uint8_t*>(values.data())}, ctx);
  std::vector<uint16_t> halves(values.size());
  std::transform(values.begin(), values.end(), halves.begin(), f32_to_f16);
  return pack({DType::F16, rows, cols, reinterpret_cast<const uint8_t*>(halves.data())}, ctx);
}

void pack_updates(PackedLinear& packed, std::initializer_list<LayerSource> layers, Context& ctx) {
  Vector down;
  int64_t ranks = 0;
  auto part = packed.parts.begin();
  for (const LayerSource& source : layers) {
    const auto& [rank, a, b] = source.layer->update;
    // A power of two moves from one factor to the other, so that both have their values in f16's middle.
    const int shift = (exponent(b) - exponent(a)) / 2;
    const Vector shifted = scaled(a, shift);
    down.insert(down.end(), shifted.begin(), shifted.end());
    if (rank > 0) part->update = {pack_factor(scaled(b, -shift), part->matrix.rows, rank, ctx), ranks};
    ranks += rank;
    ++part;
  }
  if (ranks > 0) packed.down = pack_factor(down, ranks, packed.in_features, ctx);
}

}  // namespace

bool PackedLinear::has(Inputs inputs) const {
  return std::any_of(parts.begin(), parts.end(), [&](const Part& part) { return part.inputs == inputs; });
}

std::vector<std::span<const uint8_t>> PackedLinear::storage() const {
  std::vector<std::span<const uint8_t>> all;
  const auto add = [&](const AlignedBuffer& buffer) {
    if (buffer.size() > 0) all.emplace_back(buffer.data(), buffer.size());
  };
  for (const Part& part : parts) {
    add(part.storage);
    add(part.update.up.storage);
  }
  add(down.storage);
  return all;
}

int64_t PackedLinear::weight_bytes() const {
  size_t bytes = bias.size() * sizeof(float);
  for (const auto& some : storage()) bytes += some.size();
  return static_cast<int64_t>(bytes);
}

PackedLinear pack_linear(std::string_view name, std::initializer_list<LayerSource> layers, Context& ctx,
                         const NormWeights* norm) {
  PackedLinear packed;
  packed.name = name;
  if (norm != nullptr) packed.outlier_columns = outlier_columns(norm->weight);
  const auto bits_of = [](const LayerSource& source) {
    const DType type = source.layer->weight.type;
    return is_quantized(type) ? dtype_traits(type).format.bits() : 16;
  };
  const int bits = bits_of(
      *std::min_element(layers.begin(), layers.end(),
                        [&](const LayerSource& a, const LayerSource& b) { return bits_of(a) < bits_of(b); }));
  for (const auto& [layer, inputs] : layers) {
    packed.in_features = layer->weight.cols;
    PackedMatrix matrix = pack(layer->weight, ctx);
    packed.parts.push_back({matrix.matrix, packed.out_features, std::move(matrix.storage), inputs.of(bits)});
    packed.out_features += layer->weight.rows;
    packed.bias.insert(packed.bias.end(), layer->bias.begin(), layer->bias.end());
  }
  pack_updates(packed, layers, ctx);
  ctx.scratch.reserve_kernel(matmul_scratch_bytes(packed.in_features));
  return packed;
}

PackedLinear pack_matrix(std::string_view name, const MatrixView& matrix, Context& ctx, Inputs inputs,
                         const LowRankUpdate& update) {
  const LinearWeights layer{matrix, {}, update};
  PackedLinear packed = pack_linear(name, {&layer}, ctx);
  packed.parts[0].inputs = inputs;
  return packed;
}

}  // namespace qwen2vl::cpu
