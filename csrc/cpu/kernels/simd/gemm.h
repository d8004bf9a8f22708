#pragma once

// float32 matmul over panels, written once; needs the including instruction set's simd.h.

#include "cpu/kernels/simd/tile.h"

namespace qwen2vl::cpu {
namespace {

struct ElementF32 {
  using Type = float;
  static constexpr bool kAhead = false;
  static Vec load(const float* p) { return cpu::load(p); }
};
struct ElementF16 {
  using Type = uint16_t;
  static constexpr bool kAhead = false;
  static Vec load(const uint16_t* p) { return load_f16(p); }
};
struct ElementF16Ahead : ElementF16 {
  static constexpr bool kAhead = true;
};
struct ElementBF16 {
  using Type = uint16_t;
  static constexpr bool kAhead = false;
  static Vec load(const uint16_t* p) { return load_bf16(p); }
};

template <typename Element>
struct GemmProblem {
  const float* a;
  int64_t a_stride;
  const typename Element::Type* b;
  int64_t panel_stride, n_cols, depth;
  const MatmulOutput& out;
  const typename Element::Type* ahead = nullptr;  ///< fetched at the offsets at which b is read
};

/// R rows from m, P panels from `panel`.
template <int R, int P, typename Element>
void gemm_tile(const GemmProblem<Element>& t, int64_t m, int64_t panel) {
  constexpr int V = P * kVectorsPerPanel;
  const auto* b = t.b + panel * t.panel_stride;
  const float* a = t.a + m * t.a_stride;
  Vec sums[R][V];
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = set1(0.0f);
  }
  const auto weights = [&](int64_t k, int v) {
    const auto* at =
        b + v / kVectorsPerPanel * t.panel_stride + k * kPanelRows + v % kVectorsPerPanel * kLanes;
    if constexpr (Element::kAhead) {  // two k share a cache line
      if (k % 2 == 0) prefetch(reinterpret_cast<const uint8_t*>(t.ahead + (at - t.b)));
    }
    return Element::load(at);
  };
  for (int64_t k = 0; k < t.depth; ++k) {
    if constexpr (R > V) {  // the fewer of both stay in registers, the others pass through one
      Vec w[V];
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) w[v] = weights(k, v);
      QWEN2VL_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec x = set1(a[r * t.a_stride + k]);
        QWEN2VL_UNROLL
        for (int v = 0; v < V; ++v) sums[r][v] = fma(w[v], x, sums[r][v]);
      }
    } else {
      Vec x[R];
      QWEN2VL_UNROLL
      for (int r = 0; r < R; ++r) x[r] = set1(a[r * t.a_stride + k]);
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) {
        const Vec w = weights(k, v);
        QWEN2VL_UNROLL
        for (int r = 0; r < R; ++r) sums[r][v] = fma(w, x[r], sums[r][v]);
      }
    }
  }
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) store_sums(t.out, m + r, panel * kPanelRows, t.n_cols, sums[r]);
}

template <int R, int P, typename Element>
void gemm_tile_of(int64_t rows, const GemmProblem<Element>& t, int64_t m, int64_t panel) {
  if (rows == R) return gemm_tile<R, P>(t, m, panel);
  if constexpr (R > 1) gemm_tile_of<R - 1, P>(rows, t, m, panel);
}

template <int P, typename Element>
void gemm_rows(int64_t rows, const GemmProblem<Element>& t, int64_t panel) {
  constexpr int kRows = max_tile_rows(P);
  for (int64_t m = 0; m < rows;) {
    const int64_t part = even_part(rows, m, kRows);
    gemm_tile_of<kRows, P>(part, t, m, panel);
    m += part;
  }
}

template <int P, typename Element>
void gemm_rows_of(int64_t panels, int64_t rows, const GemmProblem<Element>& t, int64_t panel) {
  if (panels == P) return gemm_rows<P>(rows, t, panel);
  if constexpr (P > 1) gemm_rows_of<P - 1>(panels, rows, t, panel);
}

template <typename Element>
void multiply(int64_t rows, const GemmProblem<Element>& t) {
  const int64_t panels = (t.n_cols + kPanelRows - 1) / kPanelRows;
  int64_t panel = 0;
  if (rows <= max_tile_rows(kWidestThinTile)) {  // many panels at once, for enough independent sums
    for (; panels - panel >= kWidestThinTile; panel += kWidestThinTile) {
      gemm_rows<kWidestThinTile>(rows, t, panel);
    }
  }
  while (panel < panels) {
    const int64_t part = even_part(panels, panel, kWidestTile);
    gemm_rows_of<kWidestTile>(part, rows, t, panel);
    panel += part;
  }
}

template <typename Element>
void gemm(const float* a, int64_t a_stride, const typename Element::Type* b, int64_t panel_stride,
          int64_t rows, int64_t n_cols, int64_t depth, const MatmulOutput& out) {
  multiply(rows, GemmProblem<Element>{a, a_stride, b, panel_stride, n_cols, depth, out});
}

inline void gemm_f16_ahead(const float* a, int64_t a_stride, const uint16_t* b, int64_t panel_stride,
                           int64_t rows, int64_t n_cols, int64_t depth, const MatmulOutput& out,
                           const uint16_t* ahead) {
  multiply(rows, GemmProblem<ElementF16Ahead>{a, a_stride, b, panel_stride, n_cols, depth, out, ahead});
}

inline void set_gemm_kernels(KernelTable& table) {
  table.gemm_f32 = gemm<ElementF32>;
  table.gemm_f16 = gemm<ElementF16>;
  table.gemm_f16_ahead = gemm_f16_ahead;
  table.gemm_bf16 = gemm<ElementBF16>;
}

}  // namespace
}  // namespace qwen2vl::cpu
