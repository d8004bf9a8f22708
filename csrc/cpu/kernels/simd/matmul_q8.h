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
//   start(correction, s)  the Acc that the s-th part's sums start from; correction = -128 * sum of its
//                      activations
//   step(acc, w, x, i) adds the products of the part's i-th step
//   finish(acc, row, correction)  the integer sums of one of the kRows rows
//   weighted(first, second, row, corrections, scales)  where QuantFormat::scales_integers: the sums of a
//                      block's two parts times the parts' scales (VectorDecoder::scale_pairs), added
//
// The integer sums are exact, of two planes too, 256 times the first's and the second's. Each part is added
// as fma(sum, w_scale * x_scale, total), the parts in order, and after each its minimum as fma(minimum,
// -sum of activations * x_scale, total). Where QuantFormat::scales_integers, integers are a block's: its
// parts' sums times their scales, and its activations' sums times minus their minima. They are added, as
// fma(sum, x_scale, group), to sums of 256 columns, and those as fma(group, scale, total), then fma(minima,
// minimum, total). Every instruction set and every tile shape gives the same bits, so a row's result does not
// depend on how many rows are computed with it.

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

/// A panel's bytes for a block of 32 columns.
constexpr int64_t bytes_per_block(const QuantFormat& f) {
  const int64_t of_part = (f.scale_bits == 16 ? 2 : 1) * (f.has_minimum && f.scale_bits > 4 ? 2 : 1);
  const int64_t eighths = f.scale_bits == 16 ? 0 : f.has_minimum ? 4 : 2;  // of what 256 columns share
  return kPanelRows * (8 * (4 * f.bits() + kBlock32 / f.part * of_part) + eighths) / 8;
}

/// Two planes' integers count 256ths of an activation's scale.
template <int N>
Vec in_units(Vec scale) {
  return N == 2 ? mul(scale, set1(1.0f / 256)) : scale;
}

/// A tile's activations: R rows of N planes.
struct Q8Rows {
  const int8_t* values;
  const float* scales;                                ///< [R][blocks]
  const int32_t* corrections;                         ///< [R][blocks][parts]
  int64_t cols, blocks, next_value, next_correction;  ///< next_: to the next plane's
};

template <int R, int V>
QWEN2VL_INLINE void clear(Vec (&sums)[R][V]) {
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = set1(0.0f);
  }
}

/// acc = the products of part s of block b.
template <DType T, int R, int V, int N>
QWEN2VL_INLINE void multiply_part(
    const VectorDecoder<T>& decoder, const Q8Rows& x, int64_t b, int s,
    typename Dot<T>::Acc (&acc)[N][(R + Dot<T>::kRows - 1) / Dot<T>::kRows][V]) {
  using D = Dot<T>;
  constexpr int S = VectorDecoder<T>::kParts, kTuples = (R + D::kRows - 1) / D::kRows,
                kSteps = static_cast<int>(kBlock32) / (S * D::kColumns);
  typename D::Activations activations[N][kTuples];
  const int32_t* correction = x.corrections + b * S + s;
  QWEN2VL_UNROLL
  for (int n = 0; n < N; ++n) {
    QWEN2VL_UNROLL
    for (int r = 0; r < R; r += D::kRows) {
      const typename D::Acc start = D::start(correction + n * x.next_correction + r * x.blocks * S, s);
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) acc[n][r / D::kRows][v] = start;
    }
  }
  const int8_t* part_begin = x.values + b * kBlock32 + s * VectorDecoder<T>::kFormat.part;
  QWEN2VL_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    typename D::Weights weights[V];
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) weights[v] = D::weights(decoder, b, s * kSteps + i, v);
    QWEN2VL_UNROLL
    for (int n = 0; n < N; ++n) {
      QWEN2VL_UNROLL
      for (int r = 0; r < R; r += D::kRows) {
        typename D::Activations& rows = activations[n][r / D::kRows];
        // A last row on its own stands in for those that are missing.
        D::load(rows, part_begin + n * x.next_value + r * x.cols, r + 1 < R ? x.cols : 0, i);
        QWEN2VL_UNROLL
        for (int v = 0; v < V; ++v) D::step(acc[n][r / D::kRows][v], weights[v], rows, i);
      }
    }
  }
}

/// Adds block b to `sums`, scaled.
template <DType T, int R, int V, int N>
QWEN2VL_INLINE void add_block(const VectorDecoder<T>& decoder, const Q8Rows& x, int64_t b,
                              Vec (&sums)[R][V]) {
  using D = Dot<T>;
  constexpr int S = VectorDecoder<T>::kParts;
  QWEN2VL_UNROLL
  for (int s = 0; s < S; ++s) {
    typename D::Acc acc[N][(R + D::kRows - 1) / D::kRows][V];
    multiply_part<T, R, V, N>(decoder, x, b, s, acc);
    const int32_t* correction = x.corrections + b * S + s;
    Vec scales[V];
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) scales[v] = in_units<N>(decoder.scale(b, s, v));
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec x_scale = set1(x.scales[r * x.blocks + b]);
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) {
        const int32_t* row = correction + r * x.blocks * S;
        const int tuple = r / D::kRows, in_tuple = r % D::kRows;
        IntVec part = D::finish(acc[0][tuple][v], in_tuple, row);
        if constexpr (N == 2)
          part = add(shift_left(part, 8), D::finish(acc[1][tuple][v], in_tuple, row + x.next_correction));
        sums[r][v] = fma(to_float(part), mul(scales[v], x_scale), sums[r][v]);
      }
    }
    if constexpr (VectorDecoder<T>::kFormat.has_minimum) {
      Vec minima[V];
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) minima[v] = in_units<N>(decoder.minimum(b, s, v));
      QWEN2VL_UNROLL
      for (int r = 0; r < R; ++r) {
        const int32_t* row = correction + r * x.blocks * S;
        const int32_t minus_sum = N == 2 ? 2 * row[0] + row[x.next_correction] / 128 : row[0] / 128;
        const Vec factor = set1(static_cast<float>(minus_sum) * x.scales[r * x.blocks + b]);
        QWEN2VL_UNROLL
        for (int v = 0; v < V; ++v) sums[r][v] = fma(minima[v], factor, sums[r][v]);
      }
    }
  }
}

/// Adds block b to the sums of its 256 columns, in units of these columns' scale and minimum.
template <DType T, int R, int V, int N>
QWEN2VL_INLINE void add_block(const VectorDecoder<T>& decoder, const Q8Rows& x, int64_t b, Vec (&sums)[R][V],
                              Vec (&minima)[R][V]) {
  using D = Dot<T>;
  constexpr QuantFormat kFormat = VectorDecoder<T>::kFormat;
  typename D::Acc first[N][(R + D::kRows - 1) / D::kRows][V], second[N][(R + D::kRows - 1) / D::kRows][V];
  multiply_part<T, R, V, N>(decoder, x, b, 0, first);
  multiply_part<T, R, V, N>(decoder, x, b, 1, second);
  IntVec scales[V], of_minima[V];
  QWEN2VL_UNROLL
  for (int v = 0; v < V; ++v) {
    scales[v] = decoder.scale_pairs(b, v);
    if constexpr (kFormat.has_minimum) of_minima[v] = decoder.minimum_pairs(b, v);
  }
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    const int32_t* row = x.corrections + (r * x.blocks + b) * 2;
    const Vec x_scale = in_units<N>(set1(x.scales[r * x.blocks + b]));
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) {
      IntVec sum = set1_int(0), minimum = sum;
      QWEN2VL_UNROLL
      for (int n = 0; n < N; ++n) {
        const int32_t* corrections = row + n * x.next_correction;
        const IntVec products = D::weighted(first[n][r / D::kRows][v], second[n][r / D::kRows][v],
                                            r % D::kRows, corrections, scales[v]);
        sum = n == 0 ? products : add(shift_left(sum, 8), products);
        if constexpr (kFormat.has_minimum) {
          const IntVec minus = add_products16(of_minima[v], minus_sums<1>(corrections));
          minimum = n == 0 ? minus : add(shift_left(minimum, 8), minus);
        }
      }
      sums[r][v] = fma(to_float(sum), x_scale, sums[r][v]);
      if constexpr (kFormat.has_minimum) minima[r][v] = fma(to_float(minimum), x_scale, minima[r][v]);
    }
  }
}

/// Adds the sums of 256 columns, of which block b is the last, and clears them.
template <DType T, int R, int V>
QWEN2VL_INLINE void add_group(const VectorDecoder<T>& decoder, int64_t b, Vec (&group)[R][V],
                              Vec (&minima)[R][V], Vec (&sums)[R][V]) {
  QWEN2VL_UNROLL
  for (int v = 0; v < V; ++v) {
    const Vec scale = decoder.block_scale(b, v);
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) sums[r][v] = fma(group[r][v], scale, sums[r][v]);
    if constexpr (VectorDecoder<T>::kFormat.has_minimum) {
      const Vec minimum = decoder.block_minimum(b, v);
      QWEN2VL_UNROLL
      for (int r = 0; r < R; ++r) sums[r][v] = fma(minima[r][v], minimum, sums[r][v]);
    }
  }
  clear(group);
  clear(minima);
}

/// R rows of N planes from m, P panels from `panel`.
template <DType T, int R, int P, int N>
void q8_tile(const Q8Problem& t, int64_t m, int64_t panel, const Ahead& ahead) {
  using Decoder = VectorDecoder<T>;
  constexpr int V = P * kVectorsPerPanel, S = Decoder::kParts;
  const int64_t cols = t.w.cols, blocks = cols / kBlock32;
  const Q8Rows x{t.x.values + m * cols,
                 t.x.scales + m * blocks,
                 (S == 1 ? t.x.corrections32 : t.x.corrections16) + m * blocks * S,
                 cols,
                 blocks,
                 t.x.rows * cols,
                 t.x.rows * blocks * S};
  const Decoder decoder(t.w, panel);

  Vec sums[R][V], group[R][V], minima[R][V];
  clear(sums);
  clear(group);
  clear(minima);
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) prefetch_output<P>(t.out, m + r, panel * kPanelRows);
  constexpr int64_t kBlockBytes = bytes_per_block(Decoder::kFormat);
  const uint8_t* fetch = ahead.begin;
  const uint8_t* const fetch_end = ahead.begin + ahead.lines * 64;
  const int64_t bytes = (ahead.lines + blocks - 1) / blocks * 64;
  for (int64_t b = 0; b < blocks; ++b) {
    if (fetch < fetch_end) {
      if constexpr (R == 1 && P == 1 && Decoder::kFormat.scales_integers()) {  // without a loop
        QWEN2VL_UNROLL
        for (int64_t i = 0; i < kBlockBytes; i += 64) prefetch(fetch + i);
        fetch += kBlockBytes;
      } else {
        for (int64_t i = 0; i < bytes; i += 64) prefetch(fetch + i);
        fetch += bytes;
      }
    }
    if constexpr (Decoder::kFormat.scales_integers()) {
      add_block<T, R, V, N>(decoder, x, b, group, minima);
      if (b % 8 == 7) add_group<T, R, V>(decoder, b, group, minima, sums);
    } else {
      add_block<T, R, V, N>(decoder, x, b, sums);
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
