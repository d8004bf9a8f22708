#pragma once

// Needs the including instruction set's simd.h.

#include "cpu/kernels/kernel_table.h"

// Loops over a register tile must be unrolled, or its accumulators live in memory.
#if defined(__clang__)
#define QWEN2VL_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define QWEN2VL_UNROLL _Pragma("GCC unroll 16")
#else
#define QWEN2VL_UNROLL
#endif

// Of a part of a tile that is a function: inlined before loops are unrolled, as if it stood there.
#if defined(__GNUC__)
#define QWEN2VL_INLINE __attribute__((always_inline)) inline
#else
#define QWEN2VL_INLINE inline
#endif

namespace qwen2vl::cpu {
namespace {

constexpr int kVectorsPerPanel = static_cast<int>(kPanelRows) / kLanes;

/// One row of a tile: V vectors of sums to columns n .. of row m, below `n_cols`.
template <int V>
inline void store_sums(const MatmulOutput& out, int64_t m, int64_t n, int64_t n_cols, const Vec (&sums)[V]) {
  float* row = out.data + m * out.stride;
  QWEN2VL_UNROLL
  for (int v = 0; v < V; ++v) {
    const int64_t column = n + v * kLanes, valid = n_cols - column;
    if (valid <= 0) return;
    Vec value = sums[v];
    if (valid >= kLanes) {
      if (out.bias != nullptr) value = add(value, load(out.bias + column));
      if (out.store == Store::Accumulate) value = add(load(row + column), value);
      store(row + column, value);
    } else {
      const Vec zero = set1(0.0f);
      if (out.bias != nullptr) value = add(value, load_first(out.bias + column, valid, zero));
      if (out.store == Store::Accumulate) value = add(load_first(row + column, valid, zero), value);
      store_first(row + column, value, valid);
    }
  }
}

/// Fetches what store_sums will write, or add to, of P panels from column n on.
template <int P>
inline void prefetch_output(const MatmulOutput& out, int64_t m, int64_t n) {
  const float* row = out.data + m * out.stride + n;
  QWEN2VL_UNROLL
  for (int p = 0; p < P; ++p) prefetch(reinterpret_cast<const uint8_t*>(row + p * kPanelRows));
}

/// Splits `n` into parts of at most `widest`, as even as can be; the size of the part that starts at `begin`.
inline int64_t even_part(int64_t n, int64_t begin, int64_t widest) {
  const int64_t left = n - begin, parts = (left + widest - 1) / widest;
  return (left + parts - 1) / parts;
}

}  // namespace
}  // namespace qwen2vl::cpu
