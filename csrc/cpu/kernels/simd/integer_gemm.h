#pragma once

// Integer matmul over panels, written once over an instruction set's products; needs its simd.h, and for each
// kernel a type
//   Dot::A, Dot::B       the elements of a and b
//   Dot::step(acc, w, x) acc + the products of every lane's 4 bytes: w of b, x of a
//   Dot::kPanels         at most so many panels a tile
//   Dot::max_rows(P)     its rows, of P panels

#include <string.h>

#include "cpu/kernels/simd/tile.h"

namespace qwen2vl::cpu {
namespace {

template <typename Dot>
struct IntegerProblem {
  const typename Dot::A* a;
  int64_t a_stride;
  const typename Dot::B* b;
  int64_t panel_stride, n_cols, depth;
  const float* scales;
  const MatmulOutput& out;
};

/// V vectors of sums, scaled, to columns n .. of row m.
template <int V, typename Dot>
inline void store_scaled(const IntegerProblem<Dot>& t, int64_t m, int64_t n, const IntVec (&sums)[V]) {
  float* row = t.out.data + m * t.out.stride;
  const Vec scale = set1(t.scales[m]);
  const bool adds = t.out.store == Store::Accumulate;
  QWEN2VL_UNROLL
  for (int v = 0; v < V; ++v) {
    const int64_t column = n + v * kLanes, valid = t.n_cols - column;
    if (valid <= 0) return;
    const Vec sum = to_float(sums[v]);
    if (valid >= kLanes) {
      store(row + column, adds ? fma(sum, scale, load(row + column)) : mul(sum, scale));
    } else {
      const Vec before = load_first(row + column, valid, scale);
      store_first(row + column, adds ? fma(sum, scale, before) : mul(sum, scale), valid);
    }
  }
}

/// R rows from m, P panels from `panel`.
template <int R, int P, typename Dot>
void integer_tile(const IntegerProblem<Dot>& t, int64_t m, int64_t panel) {
  constexpr int V = P * kVectorsPerPanel;
  constexpr int64_t kRun = 4 / sizeof(typename Dot::A);
  const auto* a = t.a + m * t.a_stride;
  const auto* b = t.b + panel * t.panel_stride;
  IntVec sums[R][V];
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = set1_int(0);
  }
  for (int64_t k = 0; k < t.depth; k += kRun) {
    IntVec w[V];
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v)
      w[v] = load_int(reinterpret_cast<const uint8_t*>(
          b + v / kVectorsPerPanel * t.panel_stride + k * kPanelRows + v % kVectorsPerPanel * kLanes * kRun));
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t run;
      memcpy(&run, a + r * t.a_stride + k, sizeof run);
      const IntVec x = set1_int(run);
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] = Dot::step(sums[r][v], w[v], x);
    }
  }
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) store_scaled(t, m + r, panel * kPanelRows, sums[r]);
}

template <int R, int P, typename Dot>
void integer_tile_of(int64_t rows, const IntegerProblem<Dot>& t, int64_t m, int64_t panel) {
  if (rows == R) return integer_tile<R, P>(t, m, panel);
  if constexpr (R > 1) integer_tile_of<R - 1, P>(rows, t, m, panel);
}

template <int P, typename Dot>
void integer_rows_of(int64_t panels, int64_t rows, const IntegerProblem<Dot>& t, int64_t panel) {
  if (panels == P) {
    constexpr int kRows = Dot::max_rows(P);
    for (int64_t m = 0; m < rows;) {
      const int64_t part = even_part(rows, m, kRows);
      integer_tile_of<kRows, P>(part, t, m, panel);
      m += part;
    }
    return;
  }
  if constexpr (P > 1) integer_rows_of<P - 1>(panels, rows, t, panel);
}

template <typename Dot>
void integer_gemm(const typename Dot::A* a, int64_t a_stride, const typename Dot::B* b, int64_t panel_stride,
                  int64_t rows, int64_t n_cols, int64_t depth, const float* scales, const MatmulOutput& out) {
  const IntegerProblem<Dot> t{a, a_stride, b, panel_stride, n_cols, depth, scales, out};
  const int64_t panels = (n_cols + kPanelRows - 1) / kPanelRows;
  for (int64_t panel = 0; panel < panels;) {
    const int64_t part = even_part(panels, panel, Dot::kPanels);
    integer_rows_of<Dot::kPanels>(part, rows, t, panel);
    panel += part;
  }
}

}  // namespace
}  // namespace qwen2vl::cpu
