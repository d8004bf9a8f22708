#include "cpu/linear_input.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/outliers.h"
#include "quant/formats.h"

namespace qwen2vl::cpu {

bool has_groups(const Context& ctx, const PackedLinear& layer) {
  return ctx.precision == Precision::Fast && ctx.kernels.has_grouped_matmul &&
         std::all_of(layer.parts.begin(), layer.parts.end(), [](const PackedLinear::Part& part) {
           return is_quantized(part.matrix.type) && part.inputs == Inputs::Groups;
         });
}

QuantizedInput quantize_input(Context& ctx, const PackedLinear& layer, const InputRows& x, bool fine,
                              const Center& center) {
  const int64_t cols = layer.in_features;
  const bool grouped = !fine && x.decoded == 0 && has_groups(ctx, layer), centered = !center.mean.empty();
  QuantizedInput input;
  if (grouped)
    input.grouped = ctx.scratch.grouped_rows(ctx.kernels.group_rule, x.rows, cols);
  else
    input.rows = ctx.scratch.quantized_rows(x.rows, cols, fine ? 2 : 1);
  for (auto& found : ctx.scratch.outliers) found.clear();
  ctx.for_rows_on_threads(x.rows, [&](int64_t r, int thread) {
    const float* row = x.data + r * x.stride;
    float* rest = ctx.scratch.threads[thread].row.resize(cols + cols / kBlock32);
    float* maxima = rest + cols;
    if (centered) {
      for (int64_t c = 0; c < cols; ++c) rest[c] = row[c] - center.mean[c];
      row = rest;
    }
    const auto take = [&](auto&& from) {
      if (row != rest) std::memcpy(rest, row, cols * sizeof(float));
      from(rest, ctx.scratch.outliers[thread]);
      row = rest;
    };
    if (!layer.outlier_columns.empty())
      take([&](float* values, auto& found) { take_columns(values, layer.outlier_columns, r, found); });
    const float limit = outlier_limit(ctx.kernels, row, cols, maxima);
    if (std::isfinite(limit))
      take([&](float* values, auto& found) { take_outliers(values, cols, maxima, limit, r, found); });
    if (grouped)
      ctx.kernels.quantize_groups(row, cols, 1, input.grouped, r);
    else
      ctx.kernels.quantize_rows(row, cols, 1, input.rows, r);
  });
  input.outliers = gather_outliers(ctx.scratch.outliers, x.rows, ctx.scratch.outlier_values);
  return input;
}

}  // namespace qwen2vl::cpu
