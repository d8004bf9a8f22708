#include "cpu/packed_linear.h"

#include <algorithm>

#include "cpu/outliers.h"
#include "quant/formats.h"

namespace qwen2vl::cpu {
namespace {

// Of a file that are read at a time: they stay in a core's cache until they are packed.
constexpr int64_t kBytesPerRead = 256 << 10;

PackedLinear::Part pack_part(const MatrixView& source, int64_t column, Context& ctx) {
  PackedLinear::Part part;
  part.column = column;
  part.matrix = {source.type, source.rows,       source.cols, panel_parts(source.type, source.cols).bytes,
                 nullptr,     ctx.kernels.layout};
  part.storage = AlignedBuffer(part.matrix.panel_count() * part.matrix.panel_bytes);
  uint8_t* out = part.storage.data();
  part.matrix.data = out;
  const int64_t source_bytes = kPanelRows * row_bytes(source.type, source.cols);  // of a panel
  const int64_t panels = std::max<int64_t>(1, kBytesPerRead / source_bytes);
  ctx.scratch.reserve_kernel(panels * source_bytes);
  ctx.pool.parallel_for(part.matrix.panel_count(), panels, [&](int64_t begin, int64_t end, int thread) {
    const int64_t rows = std::min(end * kPanelRows, source.rows) - begin * kPanelRows;
    const uint8_t* read =
        source.read_rows(begin * kPanelRows, rows, ctx.scratch.threads[thread].kernel.data());
    for (int64_t p = begin; p < end; ++p)
      pack_panel(part.matrix, read, rows, p - begin, out + p * part.matrix.panel_bytes);
  });
  return part;
}

}  // namespace

bool PackedLinear::has(Inputs inputs) const {
  return std::any_of(parts.begin(), parts.end(), [&](const Part& part) { return part.inputs == inputs; });
}

int64_t PackedLinear::weight_bytes() const {
  int64_t bytes = static_cast<int64_t>(bias.size()) * 4;
  for (const Part& part : parts) bytes += static_cast<int64_t>(part.storage.size());
  return bytes;
}

LayerSource::LayerSource(const LinearWeights* layer_, Inputs inputs_of_8_bits)
    : layer(layer_),
      inputs(dtype_traits(layer_->weight.type).format.bits() == 8 ? inputs_of_8_bits : Inputs::Groups) {}

PackedLinear pack_linear(std::string_view name, std::initializer_list<LayerSource> layers, Context& ctx,
                         const NormWeights* norm) {
  PackedLinear packed;
  packed.name = name;
  if (norm != nullptr) packed.outlier_columns = outlier_columns(norm->weight);
  for (const auto& [layer, inputs] : layers) {
    packed.in_features = layer->weight.cols;
    packed.parts.push_back(pack_part(layer->weight, packed.out_features, ctx));
    packed.parts.back().inputs = inputs;
    packed.out_features += layer->weight.rows;
    packed.bias.insert(packed.bias.end(), layer->bias.begin(), layer->bias.end());
  }
  ctx.scratch.reserve_kernel(matmul_scratch_bytes(packed.in_features));
  return packed;
}

PackedLinear pack_matrix(std::string_view name, const MatrixView& matrix, Context& ctx, Inputs inputs) {
  const LinearWeights layer{matrix, {}};
  PackedLinear packed = pack_linear(name, {&layer}, ctx);
  packed.parts[0].inputs = inputs;
  return packed;
}

}  // namespace qwen2vl::cpu
