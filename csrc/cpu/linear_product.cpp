#include "cpu/linear_product.h"

#include <algorithm>

#include "quant/formats.h"

namespace qwen2vl::cpu {

PanelMatrix from_panel(const PanelMatrix& w, int64_t panel) {
  PanelMatrix rest = w;
  rest.data = w.panel(panel);
  rest.rows -= panel * kPanelRows;
  return rest;
}

PanelMatrix from_column(const PanelMatrix& w, int64_t column, int64_t n) {
  PanelMatrix some = w;
  some.data += column * kPanelRows * dtype_traits(w.type).block_bytes;
  some.cols = n;
  return some;
}

void multiply_panels(const KernelTable& kernels, const PanelMatrix& w, const InputRows& x,
                     const MatmulTask& task, const MatmulOutput& out) {
  const int64_t first = task.panel_begin * kPanelRows;
  const int64_t columns = std::min(task.panel_end * kPanelRows, w.rows) - first;
  const float* a = x.data + task.row_begin * x.stride;
  const uint8_t* b = w.panel(task.panel_begin);
  const MatmulOutput at{out.data + task.row_begin * out.stride + first, out.stride,
                        out.bias == nullptr ? nullptr : out.bias + first, out.store};
  if (w.type == DType::F32) {
    kernels.gemm_f32(a, x.stride, reinterpret_cast<const float*>(b), w.panel_bytes / 4, task.rows(), columns,
                     w.cols, at);
  } else {
    const auto gemm = w.type == DType::F16 ? kernels.gemm_f16 : kernels.gemm_bf16;
    gemm(a, x.stride, reinterpret_cast<const uint16_t*>(b), w.panel_bytes / 2, task.rows(), columns, w.cols,
         at);
  }
}

LinearProduct::LinearProduct(Context& ctx, const PackedLinear& layer, const InputRows& x, bool fine,
                             const Center& center)
    : ctx_(ctx), x_(x) {
  if (std::any_of(layer.parts.begin(), layer.parts.end(),
                  [&](const PackedLinear::Part& part) { return in_8_bits(part.matrix); }))
    quantized_ = quantize_input(ctx, layer, x, fine || layer.has(Inputs::Fine), center);
}

bool LinearProduct::in_8_bits(const PanelMatrix& w) const {
  return ctx_.precision == Precision::Fast && is_quantized(w.type);
}

void LinearProduct::operator()(const PanelMatrix& w, const MatmulTask& task, const MatmulOutput& out,
                               int thread, bool fine) const {
  std::byte* scratch = ctx_.scratch.threads[thread].kernel_bytes();
  if (!in_8_bits(w)) return multiply_float(w, task, out, scratch);
  multiply_quantized(w, task, out, scratch, fine);
  add_outliers(w, task, out, scratch);
}

void LinearProduct::multiply_quantized(const PanelMatrix& w, const MatmulTask& task, const MatmulOutput& out,
                                       std::byte* scratch, bool fine) const {
  if (quantized_.grouped.rows > 0) {
    ctx_.kernels.matmul_groups(w, quantized_.grouped, task, out, scratch);
  } else {
    QuantizedRows rows = quantized_.rows;
    if (!fine) rows.planes = 1;
    ctx_.kernels.matmul_q8(w, rows, task, out, scratch);
  }
}

void LinearProduct::add_outliers(const PanelMatrix& w, const MatmulTask& task, const MatmulOutput& out,
                                 std::byte* scratch) const {
  const auto& [outlier_columns, values] = quantized_.outliers;
  const int64_t n = static_cast<int64_t>(outlier_columns.size());
  if (n == 0) return;
  float* columns = reinterpret_cast<float*>(scratch);  // [n][16]
  for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
    ctx_.kernels.unpack_columns(w, p, outlier_columns.data(), n, columns);
    ctx_.kernels.gemm_f32(
        values + task.row_begin * n, n, columns, n * kPanelRows, task.rows(),
        std::min(kPanelRows, w.rows - p * kPanelRows), n,
        {out.data + task.row_begin * out.stride + p * kPanelRows, out.stride, nullptr, Store::Accumulate});
  }
}

void LinearProduct::multiply_float(const PanelMatrix& w, const MatmulTask& task, const MatmulOutput& out,
                                   std::byte* scratch) const {
  if (!is_quantized(w.type)) return multiply_panels(ctx_.kernels, w, x_, task, out);
  float* values = reinterpret_cast<float*>(scratch);
  for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
    const int64_t first = p * kPanelRows;
    ctx_.kernels.unpack_panel(w, p, values);
    ctx_.kernels.gemm_f32(x_.data + task.row_begin * x_.stride, x_.stride, values, w.cols * kPanelRows,
                          task.rows(), std::min(kPanelRows, w.rows - first), w.cols,
                          {out.data + task.row_begin * out.stride + first, out.stride,
                           out.bias == nullptr ? nullptr : out.bias + first, out.store});
  }
}

}  // namespace qwen2vl::cpu
