#pragma once

#include <cstdint>

#include "base/thread_pool.h"
#include "cpu/kernels/kernel_table.h"
#include "cpu/scratch.h"
#include "model/backend.h"
#include "model/profile.h"

namespace qwen2vl::cpu {

/// Up to so many rows, products wait for memory; with more, for arithmetic.
inline constexpr int64_t kMemoryBoundRows = 16;

/// What every stage of a forward pass needs.
struct Context {
  Context(const KernelTable& kernel_table, int n_threads, Precision precision_)
      : kernels(kernel_table), pool(n_threads), precision(precision_), scratch(pool.size()) {}

  const KernelTable& kernels;
  ThreadPool pool;
  Precision precision;
  Profile profile;
  Scratch scratch;

  // RMSNorm takes a third of a microsecond for a row of 1,536 (bench/README.md), waking a thread many times
  // that. Chunks of 4 share few rows evenly; of many, chunks of 16 are claimed less often.
  static constexpr int64_t kAloneRows = 4, kFewRows = 64, kFewRowsGrain = 4, kRowsGrain = 16;

  /// fn(row, thread) for every row; in the calling thread alone where the rows are too few to be worth waking
  /// another.
  template <typename Fn>
  void for_rows_on_threads(int64_t rows, const Fn& fn) {
    if (rows < kAloneRows) {
      for (int64_t r = 0; r < rows; ++r) fn(r, 0);
      return;
    }
    pool.parallel_for(rows, rows < kFewRows ? kFewRowsGrain : kRowsGrain,
                      [&](int64_t begin, int64_t end, int thread) {
                        for (int64_t r = begin; r < end; ++r) fn(r, thread);
                      });
  }
  /// fn(row) likewise.
  template <typename Fn>
  void for_rows(int64_t rows, const Fn& fn) {
    for_rows_on_threads(rows, [&](int64_t r, int) { fn(r); });
  }
};

}  // namespace qwen2vl::cpu
