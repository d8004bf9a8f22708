#pragma once

#include "cpu/linear_input.h"

namespace qwen2vl::cpu {

/// What low-rank updates add to a layer's outputs, (x A^T) B^T: sums in float32, in an order that is a row's
/// own, however many there are.
class LowRankProduct {
 public:
  /// Multiplies the rows with the factors A of all parts. Until the next layer's is made.
  LowRankProduct(Context& ctx, const PackedLinear& layer, const InputRows& x);

  /// Adds a task's outputs to `out`, whose bias is not looked at; both count from the part's panel
  /// `first_panel` on.
  void add(const PartUpdate& update, const MatmulTask& task, const MatmulOutput& out,
           int64_t first_panel = 0) const;

 private:
  const KernelTable& kernels_;
  InputRows inner_;  // x A^T: [rows, ranks of all parts]
};

}  // namespace qwen2vl::cpu
