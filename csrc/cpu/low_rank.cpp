#include "cpu/low_rank.h"

#include <algorithm>

#include "cpu/linear_product.h"

namespace qwen2vl::cpu {
namespace {

// What of a row is multiplied at a time: the threads share even a single row.
constexpr int64_t kColumns = 1024;
constexpr int64_t kRows = 16;

}  // namespace

LowRankProduct::LowRankProduct(Context& ctx, const PackedLinear& layer, const InputRows& x)
    : kernels_(ctx.kernels) {
  const PanelMatrix& down = layer.down.matrix;
  if (down.rows == 0) return;
  const int64_t slices = (down.cols + kColumns - 1) / kColumns, blocks = (x.rows + kRows - 1) / kRows;
  const int64_t slice_values = x.rows * down.rows;
  float* sums = ctx.scratch.inner_rows.resize(slices * slice_values);
  ctx.pool.parallel_for(slices * blocks, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task % slices, row = task / slices * kRows, column = slice * kColumns;
      const PanelMatrix w = from_column(down, column, std::min(kColumns, down.cols - column));
      multiply_panels(kernels_, w, {x.data + column, x.rows, x.stride},
                      {0, w.panel_count(), row, std::min(row + kRows, x.rows)},
                      {sums + slice * slice_values, down.rows});
    }
  });
  if (slices > 1)
    ctx.for_rows(x.rows, [&](int64_t r) {
      float* row = sums + r * down.rows;
      for (int64_t slice = 1; slice < slices; ++slice)
        kernels_.add_row(row, row + slice * slice_values, down.rows);
    });
  inner_ = {sums, x.rows, down.rows};
}

void LowRankProduct::add(const PartUpdate& update, const MatmulTask& task, const MatmulOutput& out,
                         int64_t first_panel) const {
  if (update.up.matrix.rows == 0) return;
  multiply_panels(kernels_, from_panel(update.up.matrix, first_panel),
                  {inner_.data + update.column, inner_.rows, inner_.stride}, task,
                  {out.data, out.stride, nullptr, Store::Accumulate});
}

}  // namespace qwen2vl::cpu
