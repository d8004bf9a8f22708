#pragma once

// Quantized matmul over panels, written once over an instruction set's products.
//
// Weights are decoded straight from the packed panel, at every use: the vector pipes that unpack are not
// those of the dot products, and the packed panel is half of what caches would have to hold. Of the
// instruction set is wanted, before this file, a template
//   Dot<T>             over the QuantFormat of T. A step multiplies kColumns columns of kRows rows of
//                      activations:
//   Weights            these columns of kLanes rows of weights, ready for `step`
//   Activations        what is kept of kRows rows of activations from step to step
//   Acc                the integer sums of a part: of kRows rows, kLanes each
//   weights(decoder, b, i, v)  of the i-th kColumns of block b; decoder: VectorDecoder<T>
//   load(x, part, next_row, i) makes x that of the part's i-th step; part: where the first row's begins
//   start(correction)  the Acc that sums start from; correction = -128 * sum of the part's activations
//   step(acc, w, x, i) adds the products of the part's i-th step
//   finish(acc, row, correction)  the integer sums of one of the kRows rows
//
// The integer sums are exact, of two planes too, 256 times the first's and the second's. Each part is added
// as fma(sum, w_scale * x_scale, total), the parts in order, and after each its minimum as fma(minimum,
// -sum of activations * x_scale, total): every instruction set and every tile shape gives the same bits, so a
// row's result does not depend on how many rows are computed with it.

#include "cpu/kernels/simd/vector_decoder.h"

namespace qwen2vl::cpu {
namespace {

struct Q8Problem {
  const PanelMatrix& w;
  const QuantizedRows& x;
  const MatmulOutput& out;
};

/// Cache lines to fetch while a tile is computed: the panels that come next. The processor's own prefetching
/// starts anew at each part of each panel and reaches half of the memory's bandwidth.
struct Ahead {
  const uint8_t* begin;
  int64_t lines;
};

/// Two planes' integers count 256ths of an activation's scale.
template <int N>
Vec in_units(Vec scale) {
  return N == 2 ? mul(scale, set1(1.0f / 256)) : scale;
}

/// R rows of N planes from m, P panels from `panel`.
template <DType T, int R, int P, int N>
void q8_tile(const Q8Problem& t, int64_t m, int64_t panel, const Ahead& ahead) {
  using Decoder = VectorDecoder<T>;
  constexpr int V = P * kVectorsPerPanel, S = Decoder::kParts;
  constexpr int kDotRows = Dot<T>::kRows, kTuples = (R + kDotRows - 1) / kDotRows,
                kSteps = static_cast<int>(kBlock32) / (S * Dot<T>::kColumns);
  const int64_t cols = t.w.cols, blocks = cols / kBlock32;
  const int8_t* x = t.x.values + m * cols;
  const float* x_scales = t.x.scales + m * blocks;
  const int32_t* corrections = (S == 1 ? t.x.corrections32 : t.x.corrections16) + m * blocks * S;
  const int64_t next_value = t.x.rows * cols, next_correction = t.x.rows * blocks * S;  // of the next plane
  const Decoder decoder(t.w, panel);

  Vec sums[R][V];
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    prefetch_output<P>(t.out, m + r, panel * kPanelRows);
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = set1(0.0f);
  }
  const uint8_t* fetch = ahead.begin;
  const uint8_t* const fetch_end = ahead.begin + ahead.lines * 64;
  const int64_t bytes_per_block = (ahead.lines + blocks - 1) / blocks * 64;
  for (int64_t b = 0; b < blocks; ++b) {
    if (fetch < fetch_end) {
      for (int64_t i = 0; i < bytes_per_block; i += 64) prefetch(fetch + i);
      fetch += bytes_per_block;
    }
    QWEN2VL_UNROLL
    for (int s = 0; s < S; ++s) {
      typename Dot<T>::Acc acc[N][kTuples][V];
      typename Dot<T>::Activations activations[N][kTuples];
      const int32_t* correction = corrections + b * S + s;
      QWEN2VL_UNROLL
      for (int n = 0; n < N; ++n) {
        QWEN2VL_UNROLL
        for (int r = 0; r < R; r += kDotRows) {
          const typename Dot<T>::Acc start = Dot<T>::start(correction + n * next_correction + r * blocks * S);
          QWEN2VL_UNROLL
          for (int v = 0; v < V; ++v) acc[n][r / kDotRows][v] = start;
        }
      }
      const int8_t* part_begin = x + b * kBlock32 + s * Decoder::kFormat.part;
      QWEN2VL_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        typename Dot<T>::Weights weights[V];
        QWEN2VL_UNROLL
        for (int v = 0; v < V; ++v) weights[v] = Dot<T>::weights(decoder, b, s * kSteps + i, v);
        QWEN2VL_UNROLL
        for (int n = 0; n < N; ++n) {
          QWEN2VL_UNROLL
          for (int r = 0; r < R; r += kDotRows) {
            typename Dot<T>::Activations& rows = activations[n][r / kDotRows];
            // A last row on its own stands in for those that are missing.
            Dot<T>::load(rows, part_begin + n * next_value + r * cols, r + 1 < R ? cols : 0, i);
            QWEN2VL_UNROLL
            for (int v = 0; v < V; ++v) Dot<T>::step(acc[n][r / kDotRows][v], weights[v], rows, i);
          }
        }
      }
      Vec scales[V];
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) scales[v] = in_units<N>(decoder.scale(b, s, v));
      QWEN2VL_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec x_scale = set1(x_scales[r * blocks + b]);
        QWEN2VL_UNROLL
        for (int v = 0; v < V; ++v) {
          const int32_t* row = correction + r * blocks * S;
          const int tuple = r / kDotRows, in_tuple = r % kDotRows;
          IntVec part = Dot<T>::finish(acc[0][tuple][v], in_tuple, row);
          if constexpr (N == 2)
            part =
                add(shift_left(part, 8), Dot<T>::finish(acc[1][tuple][v], in_tuple, row + next_correction));
          sums[r][v] = fma(to_float(part), mul(scales[v], x_scale), sums[r][v]);
        }
      }
      if constexpr (Decoder::kFormat.has_minimum) {
        Vec minima[V];
        QWEN2VL_UNROLL
        for (int v = 0; v < V; ++v) minima[v] = in_units<N>(decoder.minimum(b, s, v));
        QWEN2VL_UNROLL
        for (int r = 0; r < R; ++r) {
          const int32_t* row = correction + r * blocks * S;
          const int32_t minus_sum = N == 2 ? 2 * row[0] + row[next_correction] / 128 : row[0] / 128;
          const Vec factor = set1(static_cast<float>(minus_sum) * x_scales[r * blocks + b]);
          QWEN2VL_UNROLL
          for (int v = 0; v < V; ++v) sums[r][v] = fma(minima[v], factor, sums[r][v]);
        }
      }
    }
  }
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) store_sums(t.out, m + r, panel * kPanelRows, t.w.rows, sums[r]);
}

template <DType T, int R, int P, int N>
void q8_tile_of(int64_t rows, const Q8Problem& t, int64_t m, int64_t panel, const Ahead& ahead) {
  if (rows == R) return q8_tile<T, R, P, N>(t, m, panel, ahead);
  if constexpr (R > 1) q8_tile_of<T, R - 1, P, N>(rows, t, m, panel, ahead);
}

/// A task's rows with P panels; `next_panels` follow.
template <DType T, int P, int N>
void q8_rows(const Q8Problem& t, const MatmulTask& task, int64_t panel, int64_t next_panels) {
  constexpr int kRows = max_q8_tile_rows(P, N);
  const int64_t tiles = (task.rows() + kRows - 1) / kRows;
  Ahead ahead{t.w.data + (panel + P) * t.w.panel_bytes,
              (next_panels * t.w.panel_bytes / 64 + tiles - 1) / (tiles > 0 ? tiles : 1)};
  for (int64_t m = task.row_begin; m < task.row_end; ahead.begin += ahead.lines * 64) {
    const int64_t part = even_part(task.row_end, m, kRows);
    q8_tile_of<T, kRows, P, N>(part, t, m, panel, ahead);
    m += part;
  }
}

template <DType T, int N>
void q8_panels(const Q8Problem& t, const MatmulTask& task) {
  const int64_t panels = t.w.panel_count();  // those after the task's are likely next
  int64_t panel = task.panel_begin;
  if (task.rows() > max_q8_tile_rows(1, N)) {
    for (; panel + kQ8TilePanels <= task.panel_end; panel += kQ8TilePanels) {
      const int64_t left = panels - panel - kQ8TilePanels;
      q8_rows<T, kQ8TilePanels, N>(t, task, panel, left < kQ8TilePanels ? left : kQ8TilePanels);
    }
  }
  // Few rows: memory is the limit, and one panel at a time is one stream.
  for (; panel < task.panel_end; ++panel) q8_rows<T, 1, N>(t, task, panel, panel + 1 < panels);
}

inline void matmul_q8(const PanelMatrix& w, const QuantizedRows& x, const MatmulTask& task,
                      const MatmulOutput& out, std::byte*) {
  const Q8Problem t{w, x, out};
  visit_quantized(w.type, [&]<DType T>() {
    const auto multiply = x.planes == 2 ? q8_panels<T, 2> : q8_panels<T, 1>;
    multiply(t, task);
  });
}

}  // namespace
}  // namespace qwen2vl::cpu
