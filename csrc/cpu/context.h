#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "cpu/float_buffer.h"
#include "cpu/kernels/kernel_table.h"
#include "cpu/outliers.h"
#include "model/backend.h"
#include "model/profile.h"

namespace qwen2vl::cpu {

/// What every stage of a forward pass needs: kernels, threads, precision and grow-only scratch.
struct Context {
  Context(const KernelTable& kernel_table, int n_threads, Precision precision_);

  const KernelTable& kernels;
  ThreadPool pool;
  Precision precision;
  Profile profile;

  /// Thread `thread`'s own scratch, at least `bytes`, 64-byte aligned. Call it outside parallel loops with
  /// the largest size first (reserve_scratch), inside with any smaller one.
  void reserve_scratch(size_t bytes);
  std::byte* scratch(int thread) const { return reinterpret_cast<std::byte*>(scratch_[thread].data()); }

  /// Room for `rows` x `cols` quantized activations; valid until the next call.
  QuantizedRows quantized(int64_t rows, int64_t cols);
  GroupedRows grouped(int64_t rows, int64_t cols);
  /// Room for the rows' outliers (outliers.h), and for `cols` numbers of a thread's own; likewise.
  FloatBuffer& outlier_values() { return outlier_values_; }
  std::vector<std::vector<Outlier>>& outliers() { return outliers_; }  ///< [thread]
  float* row(int thread, int64_t cols) { return rows_[thread].resize(cols); }
  /// Room for a task's results before they are added up, likewise.
  float* halves(int thread, int64_t elements) { return halves_[thread].resize(elements); }

  /// fn(row, thread) for every row; in the calling thread alone where the rows are too few to be worth waking
  /// another.
  template <typename Fn>
  void for_rows_on_threads(int64_t rows, const Fn& fn) {
    if (rows < 4) {
      for (int64_t r = 0; r < rows; ++r) fn(r, 0);
      return;
    }
    pool.parallel_for(rows, rows < 64 ? 4 : 16, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t r = begin; r < end; ++r) fn(r, thread);
    });
  }
  /// fn(row) likewise.
  template <typename Fn>
  void for_rows(int64_t rows, const Fn& fn) {
    for_rows_on_threads(rows, [&](int64_t r, int) { fn(r); });
  }

 private:
  uint8_t* quantized_bytes(int64_t bytes);

  std::vector<AlignedBuffer> scratch_;
  AlignedBuffer quantized_;
  FloatBuffer outlier_values_;
  std::vector<std::vector<Outlier>> outliers_;
  std::vector<FloatBuffer> rows_, halves_;
};

}  // namespace qwen2vl::cpu
