#pragma once

#include "cpu/linear_input.h"
#include "cpu/linear_tasks.h"

namespace qwen2vl::cpu {

/// A matrix from a panel on.
PanelMatrix from_panel(const PanelMatrix& w, int64_t panel);
/// Columns [column, column + n) of a matrix of F32, F16 or BF16.
PanelMatrix from_column(const PanelMatrix& w, int64_t column, int64_t n);

/// One task's products of rows with a matrix of F32, F16 or BF16.
void multiply_panels(const KernelTable& kernels, const PanelMatrix& w, const InputRows& x,
                     const MatmulTask& task, const MatmulOutput& out);

/// A layer's input as its kernels want it, and the products with it.
class LinearProduct {
 public:
  /// `fine`: of all parts.
  LinearProduct(Context& ctx, const PackedLinear& layer, const InputRows& x, bool fine = false,
                const Center& center = {});

  /// One task of a part's products; `fine` as its inputs are.
  void operator()(const PanelMatrix& w, const MatmulTask& task, const MatmulOutput& out, int thread,
                  bool fine = false) const;

 private:
  bool in_8_bits(const PanelMatrix& w) const;
  void multiply_quantized(const PanelMatrix& w, const MatmulTask& task, const MatmulOutput& out,
                          std::byte* scratch, bool fine) const;
  void add_outliers(const PanelMatrix& w, const MatmulTask& task, const MatmulOutput& out,
                    std::byte* scratch) const;
  void multiply_float(const PanelMatrix& w, const MatmulTask& task, const MatmulOutput& out,
                      std::byte* scratch) const;

  Context& ctx_;
  InputRows x_;
  QuantizedInput quantized_;
};

}  // namespace qwen2vl::cpu
