#include "cpu/linear.h"

#include <algorithm>

#include "cpu/linear_product.h"
#include "cpu/linear_tasks.h"
#include "cpu/low_rank.h"
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
  const auto add = [&](const PanelMatrix& w) {
    const bool int8 = ctx.precision == Precision::Fast && is_quantized(w.type);
    (int8 ? work.int8_ops : work.float_ops) += 2.0 * static_cast<double>(rows * w.rows * w.cols);
    work.bytes += static_cast<double>(w.panel_count() * w.panel_bytes);
  };
  for (const PackedLinear::Part& part : layer.parts) {
    add(part.matrix);
    add(part.update.up.matrix);
  }
  add(layer.down.matrix);
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
  const LowRankProduct update(ctx, layer, x);
  for_tasks(
      ctx, layer.parts, x.rows, [&](const PackedLinear::Part& part, const MatmulTask& task, int thread) {
        const float* bias = center.mean.empty() ? layer.bias_of(part) : center.output.data() + part.column;
        const MatmulOutput at{out + part.column, out_stride, bias, store};
        product(part.matrix, task, at, thread, part.inputs == Inputs::Fine);
        update.add(part.update, task, at);
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
  const LowRankProduct update(ctx, gate_up, x);
  for_tasks(ctx, {&gate, 1}, x.rows, [&](const PackedLinear::Part&, const MatmulTask& task, int thread) {
    const MatmulOutput gate_out{out, stride, gate_up.bias_of(gate), Store::Overwrite};
    product(gate.matrix, task, gate_out, thread);
    update.add(gate.update, task, gate_out);

    // up's panels as a matrix of their own: the task's columns alone, in the thread's own memory.
    const int64_t first = task.panel_begin * kPanelRows, width = task.panels() * kPanelRows;
    const float* bias = gate_up.bias_of(up);
    float* up_values = ctx.scratch.threads[thread].up.resize(x.rows * width);
    const MatmulTask own{0, task.panels(), task.row_begin, task.row_end};
    const MatmulOutput up_out{up_values, width, bias == nullptr ? nullptr : bias + first, Store::Overwrite};
    product(from_panel(up.matrix, task.panel_begin), own, up_out, thread);
    update.add(up.update, own, up_out, task.panel_begin);

    const int64_t columns = std::min(width, stride - first);
    for (int64_t r = task.row_begin; r < task.row_end; ++r)
      ctx.kernels.silu_mul(out + r * stride + first, up_values + r * width, columns);
  });
  return {out, x.rows, stride, x.decoded};
}

}  // namespace qwen2vl::cpu
