#pragma once

// Quantized matmul of many rows, written once; needs the including instruction set's simd.h, and of the set
//   kTilePanels            panels that a tile multiplies at once, 1 or kChunkPanels
//   max_group_rows(panels) rows of a tile, at most
//   dot_step(acc, w, x)    acc += products of the unsigned bytes of w and the signed bytes of x, four to a
//   lane

#include <math.h>
#include <string.h>

#include "cpu/kernels/simd/vector_decoder.h"

namespace qwen2vl::cpu {
namespace {

/// Panels that are requantized, then multiplied with all rows: a group of them stays in the first-level
/// cache.
constexpr int kChunkPanels = 4;

// --- activations ---

/// The rounding, and what becomes of tiny or non-finite groups: generic/grouped_matmul.cpp. n is a multiple
/// of 32.
inline void quantize_group(const float* x, int64_t n, int8_t* values, float* scale, int32_t* correction) {
  // Compared as integers, magnitudes order as floats do, with infinity and NaN at the top.
  const IntVec magnitude = set1_int(0x7fffffff);
  IntVec m0 = set1_int(0), m1 = m0;
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    m0 = max(m0, bit_and(as_int(load(x + i)), magnitude));
    m1 = max(m1, bit_and(as_int(load(x + i + kLanes)), magnitude));
  }
  const int32_t bits = reduce_max(max(m0, m1));
  const bool finite = bits < 0x7f800000;
  float maximum;
  memcpy(&maximum, &bits, sizeof maximum);
  const bool zeros = !finite || maximum < 1e-30f;
  *scale = !finite ? NAN : zeros ? 0.0f : maximum / 127.0f;
  if (zeros) {
    memset(values, 0, static_cast<size_t>(n));
    *correction = 0;
    return;
  }
  const Vec by = set1(127.0f / maximum);
  IntVec sum = set1_int(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    const IntVec q = to_int(mul(load(x + i), by));
    sum = add(sum, q);
    store_int8(values + i, q);
  }
  *correction = -128 * static_cast<int32_t>(reduce_add(to_float(sum)));
}

inline void quantize_groups(const float* x, int64_t x_stride, int64_t rows, const GroupedRows& out,
                            int64_t row_begin) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t g = 0; g < out.groups(); ++g) {
      const int64_t at = g * out.rows + row_begin + i;
      quantize_group(x + i * x_stride + g * kGroupColumns, out.columns(g), out.values + at * kGroupColumns,
                     out.scales + at, out.corrections + at);
    }
  }
}

// --- weights ---

/// bytes * multipliers / 2^15, rounded, plus 128. multipliers: the same 16-bit number twice a lane.
inline IntVec requantize(IntVec bytes, IntVec multipliers) {
  const IntVec even = mul_high_rounded16(shift_right_signed16(shift_left16(bytes, 8), 8), multipliers);
  const IntVec odd = mul_high_rounded16(shift_right_signed16(bytes, 8), multipliers);
  return bit_xor(odd_bytes(even, shift_left16(odd, 8)), set1_bytes(0x80));
}

/// q * multipliers - minima (with what rounds in it) in 16 bits, the upper half of it, plus 128. q: unsigned
/// bytes; the others: the same 16-bit number twice a lane.
inline IntVec requantize(IntVec q, IntVec multipliers, IntVec minima) {
  const IntVec low = bit_and(q, set1_int(0x00ff00ff)), high = shift_right16(q, 8);
  const IntVec even = shift_right16(sub16(mul_low16(low, multipliers), minima), 8);
  const IntVec odd = sub16(mul_low16(high, multipliers), minima);
  return bit_xor(odd_bytes(even, odd), set1_bytes(0x80));
}

inline Vec magnitude(Vec x) { return as_float(bit_and(as_int(x), set1_int(0x7fffffff))); }

/// The number of every lane in both its halves.
inline IntVec twice(IntVec x) { return bit_or(bit_and(x, set1_int(0xffff)), shift_left(x, 16)); }

/// Vector v of `blocks` blocks of a panel from block `begin` on, as unsigned bytes with the offset 128, to
/// out [blocks * 8][16 rows][4], and their rows' common scales. The rules stand at
/// KernelTable::matmul_groups.
template <DType T>
void requantize_vector(const PanelMatrix& w, int64_t panel, int v, int64_t begin, int64_t blocks,
                       uint8_t* out, float* out_scales) {
  constexpr QuantFormat kFormat = traits_of(T).format;
  constexpr bool kMinimum = kFormat.has_minimum;
  constexpr int kParts = VectorDecoder<T>::kParts, kGroups = 8 / kParts,
                kShift = kFormat.is_signed() ? 0 : 8 - kFormat.bits();
  constexpr float kUnit = kMinimum ? 1.0f / 127 : 128.0f / 127 / (1 << kShift);
  static_assert(kMinimum || kFormat.is_signed() || kFormat.offset == 1 << (kFormat.bits() - 1));
  const VectorDecoder<T> decoder(w, panel);
  Vec scales[kGroupBlocks * kParts], minima[kMinimum ? kGroupBlocks * kParts : 1];
  Vec maximum = set1(0.0f);
  Mask finite = less(maximum, set1(INFINITY));
  const auto note = [&](Vec x) {
    finite = both(finite, less(magnitude(x), set1(INFINITY)));
    maximum = max(magnitude(x), maximum);
  };
  for (int64_t b = 0; b < blocks; ++b) {
    QWEN2VL_UNROLL
    for (int s = 0; s < kParts; ++s) {
      const Vec scale = scales[b * kParts + s] = decoder.scale(begin + b, s, v);
      if constexpr (kMinimum) {
        const Vec minimum = minima[b * kParts + s] = decoder.minimum(begin + b, s, v);
        note(minimum);
        note(sub(mul(scale, set1((1 << kFormat.bits()) - 1)), minimum));
      } else {
        note(scale);
      }
    }
  }
  const Mask usable = both(finite, less(set1(0.0f), maximum));
  const Vec inverse = div(set1(kMinimum ? 127 * 256 : kGroupMultiplier), maximum);
  store(out_scales, select(finite, mul(maximum, set1(kUnit)), set1(NAN)));
  const auto multiplier = [&](Vec x) { return to_int(select(usable, mul(x, inverse), set1(0.0f))); };
  for (int64_t b = 0; b < blocks; ++b) {
    QWEN2VL_UNROLL
    for (int s = 0; s < kParts; ++s) {
      const IntVec scale = twice(multiplier(scales[b * kParts + s]));
      IntVec minimum = set1_int(0);
      if constexpr (kMinimum) minimum = twice(sub(multiplier(minima[b * kParts + s]), set1_int(1 << 7)));
      QWEN2VL_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const int group = s * kGroups + g;
        prefetch(decoder.group(begin + blocks + b, group, v));
        IntVec bytes;
        if constexpr (kMinimum) {
          bytes = requantize(decoder.quants(begin + b, group, v), scale, minimum);
        } else {
          bytes = decoder.quants(begin + b, group, v, kShift);
          if constexpr (!kFormat.is_signed()) bytes = bit_xor(bytes, set1_bytes(0x80));
          bytes = requantize(bytes, scale);
        }
        store_int(out + (b * 8 + group) * kGroupBytes, bytes);
      }
    }
  }
}

// --- product ---

/// What a tile multiplies: `columns` of some rows with the requantized panels.
struct GroupTile {
  const int8_t* x;             // [rows][kGroupColumns]
  const float* x_scales;       // [rows]
  const int32_t* corrections;  // [rows]
  const uint8_t* weights;      // [panels][kGroupColumns / 4][16 rows][4]
  const float* scales;         // [panels][16]
  int64_t columns;
  float* sums;  // [rows][kChunkPanels * 16], of the groups before where this is not the first
  bool is_first, is_last;
  const MatmulOutput& out;  // where the sums go from the last group on: these rows, from `column` on
  int64_t row, column, n_cols;

  GroupTile from_row(int64_t m) const {
    GroupTile t = *this;
    t.x += m * kGroupColumns;
    t.x_scales += m;
    t.corrections += m;
    t.sums += m * kChunkPanels * kPanelRows;
    t.row += m;
    return t;
  }
  GroupTile from_panel(int64_t p) const {
    GroupTile t = *this;
    t.weights += p * kGroupColumns * kPanelRows;
    t.scales += p * kPanelRows;
    t.sums += p * kPanelRows;
    t.column += p * kPanelRows;
    return t;
  }
};

template <int R, int P>
void multiply_tile(const GroupTile& t) {
  constexpr int V = P * kVectorsPerPanel;
  if (t.is_last) {
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) prefetch_output<P>(t.out, t.row + r, t.column);
  }
  IntVec acc[R][V];
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] = set1_int(t.corrections[r]);
  }
  const int8_t* x = t.x;
  const uint8_t* w = t.weights;
  for (const int8_t* const end = x + t.columns; x < end; x += 4, w += kGroupBytes) {
    IntVec weights[V];
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v)
      weights[v] =
          load_int(w + v / kVectorsPerPanel * kGroupColumns * kPanelRows + v % kVectorsPerPanel * kLanes * 4);
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) {
      const IntVec group = broadcast_group(x + r * kGroupColumns);
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) dot_step(acc[r][v], weights[v], group);
    }
  }
  Vec scales[V];
  QWEN2VL_UNROLL
  for (int v = 0; v < V; ++v) scales[v] = load(t.scales + v * kLanes);
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec x_scale = set1(t.x_scales[r]);
    float* before = t.sums + r * kChunkPanels * kPanelRows;
    Vec sums[V];
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v)
      sums[v] = fma(to_float(acc[r][v]), mul(scales[v], x_scale),
                    t.is_first ? set1(0.0f) : load(before + v * kLanes));
    if (t.is_last) {
      store_sums(t.out, t.row + r, t.column, t.n_cols, sums);
    } else {
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) store(before + v * kLanes, sums[v]);
    }
  }
}

template <int R, int P>
void multiply_tile_of(int64_t rows, const GroupTile& t) {
  if (rows == R) return multiply_tile<R, P>(t);
  if constexpr (R > 1) multiply_tile_of<R - 1, P>(rows, t);
}

/// `rows` rows with P panels, a tile after the other: those of a row follow each other.
template <int P>
void multiply_rows(int64_t rows, const GroupTile& t) {
  constexpr int kTile = P < kTilePanels ? P : kTilePanels, kRows = max_group_rows(kTile);
  for (int64_t m = 0; m < rows;) {
    const int64_t part = even_part(rows, m, kRows);
    for (int p = 0; p < P; p += kTile) multiply_tile_of<kRows, kTile>(part, t.from_row(m).from_panel(p));
    m += part;
  }
}

struct GroupedProblem {
  const PanelMatrix& w;
  const GroupedRows& x;
  const MatmulTask& task;
  const MatmulOutput& out;
  std::byte* scratch;
};

/// The task's rows with P panels from `panel`.
template <DType T, int P>
void multiply_panels(const GroupedProblem& t, int64_t panel) {
  const GroupedRows& x = t.x;
  auto* weights = reinterpret_cast<uint8_t*>(t.scratch);
  auto* scales = reinterpret_cast<float*>(weights + kChunkPanels * kPanelRows * kGroupColumns);
  float* sums = scales + kChunkPanels * kPanelRows;
  for (int64_t g = 0; g < x.groups(); ++g) {
    const int64_t columns = x.columns(g), at = g * x.rows + t.task.row_begin;
    for (int v = 0; v < P * kVectorsPerPanel; ++v) {
      const int p = v / kVectorsPerPanel, lane = v % kVectorsPerPanel * kLanes;
      requantize_vector<T>(t.w, panel + p, v % kVectorsPerPanel, g * kGroupBlocks, columns / kBlock32,
                           weights + p * kPanelRows * kGroupColumns + lane * 4,
                           scales + p * kPanelRows + lane);
    }
    multiply_rows<P>(t.task.rows(), {x.values + at * kGroupColumns, x.scales + at, x.corrections + at,
                                     weights, scales, columns, sums, g == 0, g + 1 == x.groups(), t.out,
                                     t.task.row_begin, panel * kPanelRows, t.w.rows});
  }
}

template <DType T>
void multiply(const GroupedProblem& t) {
  int64_t panel = t.task.panel_begin;
  for (; panel + kChunkPanels <= t.task.panel_end; panel += kChunkPanels)
    multiply_panels<T, kChunkPanels>(t, panel);
  for (; panel < t.task.panel_end; ++panel) multiply_panels<T, 1>(t, panel);
}

inline void matmul_groups(const PanelMatrix& w, const GroupedRows& x, const MatmulTask& task,
                          const MatmulOutput& out, std::byte* scratch) {
  const GroupedProblem t{w, x, task, out, scratch};
  visit_quantized(w.type, [&]<DType T>() { multiply<T>(t); });
}

inline void set_grouped_kernels(KernelTable& table) {
  table.has_grouped_matmul = true;
  table.group_rule = GroupRule::Bytes;
  table.quantize_groups = quantize_groups;
  table.matmul_groups = matmul_groups;
}

}  // namespace
}  // namespace qwen2vl::cpu
