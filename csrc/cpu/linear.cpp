#include "cpu/linear.h"

#include <algorithm>

#include "cpu/linear_product.h"
#include "cpu/linear_tasks.h"
#include "quant/formats.h"

namespace qwen2vl::cpu {
namespace {

// Columns of a mean per task: 1 KiB of every row, in whole cache lines.
constexpr int64_t kColumnsPerTask = 256;

/// Whether decoded rows and others stand side by side where they go different ways.
bool is_mixed(const Context& ctx, const PackedLinear& layer, const InputRows& x) {
  return x.decoded > 0 && x.decoded < x.rows && has_groups(ctx, layer);
}

/// What `rows` rows cost at least.
Work linear_work(const Context& ctx, const PackedLinear& layer, int64_t rows) {
  Work work;
  for (const PackedLinear::Part& part : layer.parts) {
    const bool int8 = ctx.precision == Precision::Fast && is_quantized(part.matrix.type);
    (int8 ? work.int8_ops : work.float_ops) +=
        2.0 * static_cast<double>(rows * part.matrix.rows * part.matrix.cols);
    work.bytes += static_cast<double>(part.storage.size());
  }
  return work;
}

}  // namespace

void linear(Context& ctx, const PackedLinear& layer, const InputRows& x, float* out, int64_t out_stride,
            Store store, const Center& center) {
  if (is_mixed(ctx, layer, x)) {
    linear(ctx, layer, x.first(x.decoded), out, out_stride, store, center);
    linear(ctx, layer, x.after(x.decoded), out + x.decoded * out_stride, out_stride, store, center);
    return;
  }
  const auto stage = ctx.profile.stage(layer.name, linear_work(ctx, layer, x.rows));
  const LinearProduct product(ctx, layer, x, false, center);
  for_tasks(
      ctx, layer.parts, x.rows, [&](const PackedLinear::Part& part, const MatmulTask& task, int thread) {
        const float* bias = center.mean.empty() ? layer.bias_of(part) : center.output.data() + part.column;
        product(part.matrix, task, {out + part.column, out_stride, bias, store}, thread,
                part.inputs == Inputs::Fine);
      });
}

Center center_of(Context& ctx, const PackedLinear& layer, const InputRows& x) {
  if (!has_groups(ctx, layer)) return {};
  const auto stage = ctx.profile.stage(layer.name);
  const int64_t cols = layer.in_features;
  Center center{Vector(cols), Vector(layer.out_features)};
  ctx.pool.parallel_for(cols, kColumnsPerTask, [&](int64_t begin, int64_t end, int) {
    float* mean = center.mean.data() + begin;
    for (int64_t r = 0; r < x.rows; ++r)
      ctx.kernels.add_row(mean, x.data + r * x.stride + begin, end - begin);
    ctx.kernels.scale_row(mean, 1.0f / static_cast<float>(x.rows), end - begin);
  });
  // In 16 bits: what is lost here is lost of every row.
  const LinearProduct product(ctx, layer, {center.mean.data(), 1, cols}, true);
  for_tasks(ctx, layer.parts, 1, [&](const PackedLinear::Part& part, const MatmulTask& task, int thread) {
    product(part.matrix, task,
            {center.output.data() + part.column, layer.out_features, layer.bias_of(part), Store::Overwrite},
            thread, true);
  });
  return center;
}

InputRows linear_swiglu(Context& ctx, const PackedLinear& gate_up, const InputRows& x, float* out) {
  const int64_t stride = gate_up.parts[0].matrix.rows;
  if (is_mixed(ctx, gate_up, x)) {
    linear_swiglu(ctx, gate_up, x.first(x.decoded), out);
    linear_swiglu(ctx, gate_up, x.after(x.decoded), out + x.decoded * stride);
    return {out, x.rows, stride, x.decoded};
  }
  const auto stage = ctx.profile.stage(gate_up.name, linear_work(ctx, gate_up, x.rows));
  const PackedLinear::Part &gate = gate_up.parts[0], &up = gate_up.parts[1];
  const LinearProduct product(ctx, gate_up, x);
  for_tasks(ctx, {&gate, 1}, x.rows, [&](const PackedLinear::Part&, const MatmulTask& task, int thread) {
    product(gate.matrix, task, {out, stride, gate_up.bias_of(gate), Store::Overwrite}, thread);

    // up's panels as a matrix of their own: the task's columns alone, in the thread's own memory.
    const int64_t first = task.panel_begin * kPanelRows, width = task.panels() * kPanelRows;
    const float* bias = gate_up.bias_of(up);
    float* up_values = ctx.scratch.threads[thread].up.resize(x.rows * width);
    product(from_panel(up.matrix, task.panel_begin), {0, task.panels(), task.row_begin, task.row_end},
            {up_values, width, bias == nullptr ? nullptr : bias + first, Store::Overwrite}, thread);

    const int64_t columns = std::min(width, stride - first);
    for (int64_t r = task.row_begin; r < task.row_end; ++r)
      ctx.kernels.silu_mul(out + r * stride + first, up_values + r * width, columns);
  });
  return {out, x.rows, stride, x.decoded};
}

}  // namespace qwen2vl::cpu
