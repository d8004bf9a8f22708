#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpu/float_buffer.h"
#include "cpu/kernels/kernel_table.h"
#include "cpu/outliers.h"

namespace qwen2vl::cpu {

/// What one thread writes and reads within a task of a parallel loop, and nobody else.
struct ThreadScratch {
  /// Of a kernel: matmul_scratch_bytes or an attention tile; while weights are packed, their rows as a file
  /// has them.
  AlignedBuffer kernel;
  FloatBuffer row;  ///< [in_features] a row less its mean and outliers, [in_features / 32] its maxima
  FloatBuffer up;   ///< [rows][columns of a task]: SwiGLU's factor of silu(gate)

  std::byte* kernel_bytes() const { return reinterpret_cast<std::byte*>(kernel.data()); }
};

/// The buffers that the layers of a forward pass use one after another. They only grow; contents last as long
/// as is said.
struct Scratch {
  explicit Scratch(int n_threads) : threads(n_threads), outliers(n_threads) {}

  std::vector<ThreadScratch> threads;

  FloatBuffer inner_rows;  ///< of LowRankProduct: until the next layer's

  // --- a layer's input in 8 bits: until the next layer's is quantized ---

  std::vector<std::vector<Outlier>> outliers;  ///< [thread]: those that it found in its rows
  FloatBuffer outlier_values;                  ///< [rows][columns that have outliers]
  AlignedBuffer quantized;                     ///< what one of the following two has last returned

  QuantizedRows quantized_rows(int64_t rows, int64_t cols, int planes);
  GroupedRows grouped_rows(GroupRule rule, int64_t rows, int64_t cols);

  /// Room for ThreadScratch::kernel of every thread, outside parallel loops; within one, at most so much is
  /// there.
  void reserve_kernel(size_t bytes);
};

}  // namespace qwen2vl::cpu
