#include <math.h>
#include <string.h>

// clang-format off: tile.h is written in the names of simd.h
#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/simd/tile.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// Panels multiplied at once, rows of their tile: 24 sums, 4 weights and a broadcast fit 32 registers.
constexpr int kTilePanels = 4, kWideRows = 6, kThinRows = 12;

// --- activations
// ----------------------------------------------------------------------------------------------

/// The rounding, and what becomes of tiny or non-finite groups: generic/grouped_matmul.cpp. n is a multiple
/// of 32.
void quantize_group(const float* x, int64_t n, int8_t* values, float* scale, int32_t* correction) {
  // Compared as integers, magnitudes order as floats do, with infinity and NaN at the top.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i m0 = _mm512_setzero_si512(), m1 = m0;
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    m0 = _mm512_max_epi32(m0, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    m1 = _mm512_max_epi32(m1, _mm512_and_si512(_mm512_loadu_si512(x + i + kLanes), magnitude));
  }
  const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(m0, m1));
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
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512i q = to_int(mul(load(x + i), by));
    sum = _mm512_add_epi32(sum, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i), _mm512_cvtepi32_epi8(q));
  }
  *correction = -128 * _mm512_reduce_add_epi32(sum);
}

void quantize_groups(const float* x, int64_t x_stride, int64_t rows, const GroupedRows& out,
                     int64_t row_begin) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t g = 0; g < out.groups(); ++g) {
      const int64_t at = g * out.rows + row_begin + i;
      quantize_group(x + i * x_stride + g * kGroupColumns, out.columns(g), out.values + at * kGroupColumns,
                     out.scales + at, out.corrections + at);
    }
  }
}

// --- weights
// -------------------------------------------------------------------------------------------------- A source
// reads one weight type from the packed panel:
//   kParts        parts with a scale of their own per block of 32
//   kUnit         what the rows' common scale is multiplied by: the quants are shifted up to fill 8 bits
//   Source(w, panel)
//   scale(b, s)   scales of the s-th part of block b
//   load(b, g)    the quants of group g (0..7: four k of 16 rows) of block b, as signed bytes
//   ahead(b, g)   where that is in the next group of columns, to fetch it

struct SourceQ8 {
  static constexpr int kParts = 1;
  static constexpr float kUnit = 128.0f / 127;
  const uint8_t* quants;
  const uint8_t* scales;

  SourceQ8(const PanelMatrix& w, int64_t panel)
      : quants(w.panel(panel)), scales(quants + panel_parts(w.type, w.cols).scales) {}
  Vec scale(int64_t b, int) const {
    return load_f16(reinterpret_cast<const uint16_t*>(scales) + b * kPanelRows);
  }
  const uint8_t* at(int64_t b, int g) const { return quants + (b * 8 + g) * kGroupBytes; }
  __m512i load(int64_t b, int g) const { return _mm512_loadu_si512(at(b, g)); }
};

/// A nibble q of x = scale * (q - 8), as 16 (q - 8).
inline __m512i shifted_nibbles(__m512i packed, bool high) {
  const __m512i top = _mm512_and_si512(high ? packed : _mm512_slli_epi16(packed, 4), _mm512_set1_epi8(-16));
  return _mm512_xor_si512(top, _mm512_set1_epi8(-128));
}

struct SourceQ4 {
  static constexpr int kParts = 1;
  static constexpr float kUnit = 128.0f / 127 / 16;
  const uint8_t* quants;
  const uint8_t* scales;

  SourceQ4(const PanelMatrix& w, int64_t panel)
      : quants(w.panel(panel)), scales(quants + panel_parts(w.type, w.cols).scales) {}
  Vec scale(int64_t b, int) const {
    return load_f16(reinterpret_cast<const uint16_t*>(scales) + b * kPanelRows);
  }
  const uint8_t* at(int64_t b, int g) const { return quants + (b * 4 + g % 4) * kGroupBytes; }
  __m512i load(int64_t b, int g) const { return shifted_nibbles(_mm512_loadu_si512(at(b, g)), g >= 4); }
};

struct SourceQ6 {
  static constexpr int kParts = 2;
  static constexpr float kUnit = 128.0f / 127 / 4;
  const uint8_t* quants;
  const uint8_t* high;
  const uint8_t* subs;
  const uint8_t* supers;

  SourceQ6(const PanelMatrix& w, int64_t panel) : quants(w.panel(panel)) {
    const PanelParts parts = panel_parts(w.type, w.cols);
    high = quants + parts.high;
    subs = quants + parts.scales;
    supers = quants + parts.super;
  }
  Vec scale(int64_t b, int s) const {
    const Vec super = load_f16(reinterpret_cast<const uint16_t*>(supers) + b / 8 * kPanelRows);
    return mul(super, to_float(load_int8(subs + (b * 2 + s) * kPanelRows)));
  }
  const uint8_t* at(int64_t b, int g) const { return quants + (b * 4 + g % 4) * kGroupBytes; }
  __m512i load(int64_t b, int g) const {  // 4 (q - 32): six bits from bit 2 on
    const __m512i low = _mm512_loadu_si512(at(b, g));
    __m512i bits = _mm512_loadu_si512(high + (b * 2 + g % 2) * kGroupBytes);
    const int f = g / 2;  // bits 2 f and 2 f + 1, wanted at 6 and 7
    bits = _mm512_slli_epi16(bits, static_cast<unsigned>(6 - 2 * f));
    const __m512i nibble = g < 4 ? _mm512_slli_epi16(low, 2) : _mm512_srli_epi16(low, 2);
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x3c), nibble, bits, 0xca);
    const __m512i q = _mm512_and_si512(both, _mm512_set1_epi8(-4));
    return _mm512_xor_si512(q, _mm512_set1_epi8(-128));
  }
};

/// bytes * multipliers / 2^15, rounded, plus 128. multipliers: the same 16-bit number twice a lane.
inline __m512i requantize(__m512i bytes, __m512i multipliers) {
  const __m512i even = _mm512_mulhrs_epi16(_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), multipliers);
  const __m512i odd = _mm512_mulhrs_epi16(_mm512_srai_epi16(bytes, 8), multipliers);
  const __m512i both = _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaau, _mm512_slli_epi16(odd, 8));
  return _mm512_xor_si512(both, _mm512_set1_epi8(-128));
}

/// `blocks` blocks of a panel from block `begin` on, as unsigned bytes with the offset 128, to
/// out [blocks * 8][16 rows][4], and their rows' common scales.
template <typename Source>
void requantize_panel(const PanelMatrix& w, int64_t panel, int64_t begin, int64_t blocks, uint8_t* out,
                      float* out_scales) {
  constexpr int kParts = Source::kParts, kGroups = 8 / kParts;
  const Source source(w, panel);
  const Vec magnitude = as_float(set1_int(0x7fffffff));
  Vec scales[kGroupColumns / kBlock32 * kParts];
  Vec maximum = set1(0.0f);
  __mmask16 finite = 0xffff;
  for (int64_t b = 0; b < blocks; ++b) {
    QWEN2VL_UNROLL
    for (int s = 0; s < kParts; ++s) {
      const Vec scale = source.scale(begin + b, s);
      scales[b * kParts + s] = scale;
      const Vec size = _mm512_and_ps(scale, magnitude);
      finite &= _mm512_cmp_ps_mask(size, set1(INFINITY), _CMP_LT_OQ);
      maximum = max(size, maximum);
    }
  }
  const __mmask16 usable = finite & _mm512_cmp_ps_mask(maximum, set1(0.0f), _CMP_GT_OQ);
  const Vec inverse = _mm512_maskz_div_ps(usable, set1(kGroupMultiplier), maximum);
  store(out_scales, _mm512_mask_mul_ps(set1(NAN), finite, maximum, set1(Source::kUnit)));
  for (int64_t b = 0; b < blocks; ++b) {
    QWEN2VL_UNROLL
    for (int s = 0; s < kParts; ++s) {
      const __m512i low = _mm512_maskz_cvtps_epi32(usable, mul(scales[b * kParts + s], inverse));
      const __m512i multipliers = _mm512_mask_mov_epi16(low, 0xaaaaaaaau, _mm512_slli_epi32(low, 16));
      QWEN2VL_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const int group = s * kGroups + g;
        prefetch(source.at(begin + blocks + b, group));
        _mm512_store_si512(out + (b * 8 + group) * kGroupBytes,
                           requantize(source.load(begin + b, group), multipliers));
      }
    }
  }
}

// --- product
// --------------------------------------------------------------------------------------------------

/// acc += products of the unsigned bytes of `w` and the signed bytes of `x`, four to a lane. As an intrinsic,
/// GCC 12 keeps a copy of every sum on the stack.
inline void dot_step(__m512i& acc, __m512i w, __m512i x) {
#if defined(__GNUC__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
#else
  acc = _mm512_dpbusd_epi32(acc, w, x);
#endif
}

/// What a tile multiplies: `columns` of some rows with the requantized panels.
struct GroupTile {
  const int8_t* x;             // [rows][kGroupColumns]
  const float* x_scales;       // [rows]
  const int32_t* corrections;  // [rows]
  const uint8_t* weights;      // [panels][kGroupColumns / 4][16 rows][4]
  const float* scales;         // [panels][16]
  int64_t columns;
  float* sums;  // [rows][kTilePanels * 16], of the groups before where this is not the first
  bool is_first, is_last;
  const MatmulOutput& out;  // where the sums go from the last group on: these rows, from `column` on
  int64_t row, column, n_cols;
};

template <int R, int P>
void multiply_tile(const GroupTile& t) {
  if (t.is_last) {
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) prefetch_output<P>(t.out, t.row + r, t.column);
  }
  __m512i acc[R][P];
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    QWEN2VL_UNROLL
    for (int p = 0; p < P; ++p) acc[r][p] = _mm512_set1_epi32(t.corrections[r]);
  }
  const int8_t* x = t.x;
  const uint8_t* w = t.weights;
  for (const int8_t* const end = x + t.columns; x < end; x += 4, w += kGroupBytes) {
    __m512i weights[P];
    QWEN2VL_UNROLL
    for (int p = 0; p < P; ++p) weights[p] = _mm512_load_si512(w + p * kGroupColumns * kPanelRows);
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t four;
      memcpy(&four, x + r * kGroupColumns, sizeof four);
      const __m512i group = _mm512_set1_epi32(four);
      QWEN2VL_UNROLL
      for (int p = 0; p < P; ++p) dot_step(acc[r][p], weights[p], group);
    }
  }
  Vec scales[P];
  QWEN2VL_UNROLL
  for (int p = 0; p < P; ++p) scales[p] = load(t.scales + p * kPanelRows);
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec x_scale = set1(t.x_scales[r]);
    float* before = t.sums + r * kTilePanels * kPanelRows;
    Vec sums[P];
    QWEN2VL_UNROLL
    for (int p = 0; p < P; ++p)
      sums[p] = fma(to_float(acc[r][p]), mul(scales[p], x_scale),
                    t.is_first ? set1(0.0f) : load(before + p * kPanelRows));
    if (t.is_last) {
      store_sums(t.out, t.row + r, t.column, t.n_cols, sums);
    } else {
      QWEN2VL_UNROLL
      for (int p = 0; p < P; ++p) store(before + p * kPanelRows, sums[p]);
    }
  }
}

template <int R, int P>
void multiply_tile_of(int64_t rows, const GroupTile& t) {
  if (rows == R) return multiply_tile<R, P>(t);
  if constexpr (R > 1) multiply_tile_of<R - 1, P>(rows, t);
}

template <int P>
void multiply_rows(int64_t rows, GroupTile t) {
  constexpr int kRows = P == 1 ? kThinRows : kWideRows;
  for (int64_t m = 0; m < rows;) {
    const int64_t part = even_part(rows, m, kRows);
    multiply_tile_of<kRows, P>(part, t);
    m += part;
    t.x += part * kGroupColumns;
    t.x_scales += part;
    t.corrections += part;
    t.sums += part * kTilePanels * kPanelRows;
    t.row += part;
  }
}

struct Task {
  const PanelMatrix& w;
  const GroupedRows& x;
  int64_t row_begin, row_end;
  const MatmulOutput& out;
  std::byte* scratch;
};

/// All rows with P panels from `panel`.
template <typename Source, int P>
void multiply_panels(const Task& t, int64_t panel) {
  const GroupedRows& x = t.x;
  const int64_t rows = t.row_end - t.row_begin;
  auto* weights = reinterpret_cast<uint8_t*>(t.scratch);
  auto* scales = reinterpret_cast<float*>(weights + kTilePanels * kPanelRows * kGroupColumns);
  float* sums = scales + kTilePanels * kPanelRows;
  for (int64_t g = 0; g < x.groups(); ++g) {
    const int64_t columns = x.columns(g), at = g * x.rows + t.row_begin;
    for (int p = 0; p < P; ++p)
      requantize_panel<Source>(t.w, panel + p, g * kGroupBlocks, columns / kBlock32,
                               weights + p * kPanelRows * kGroupColumns, scales + p * kPanelRows);
    multiply_rows<P>(
        rows, {x.values + at * kGroupColumns, x.scales + at, x.corrections + at, weights, scales, columns,
               sums, g == 0, g + 1 == x.groups(), t.out, t.row_begin, panel * kPanelRows, t.w.rows});
  }
}

template <typename Source>
void multiply(const Task& t, int64_t panel_begin, int64_t panel_end) {
  int64_t panel = panel_begin;
  for (; panel + kTilePanels <= panel_end; panel += kTilePanels)
    multiply_panels<Source, kTilePanels>(t, panel);
  for (; panel < panel_end; ++panel) multiply_panels<Source, 1>(t, panel);
}

void matmul_groups(const PanelMatrix& w, int64_t panel_begin, int64_t panel_end, const GroupedRows& x,
                   int64_t row_begin, int64_t row_end, const MatmulOutput& out, std::byte* scratch) {
  const Task t{w, x, row_begin, row_end, out, scratch};
  switch (w.type) {
    case DType::Q8_0:
      return multiply<SourceQ8>(t, panel_begin, panel_end);
    case DType::Q4_0:
      return multiply<SourceQ4>(t, panel_begin, panel_end);
    case DType::Q6_K:
      return multiply<SourceQ6>(t, panel_begin, panel_end);
    default:  // float types have no int8 matmul
      return;
  }
}

}  // namespace

namespace avx512 {
void add_grouped_matmul(KernelTable& table) {
  table.has_grouped_matmul = true;
  table.quantize_groups = quantize_groups;
  table.matmul_groups = matmul_groups;
}
}  // namespace avx512
}  // namespace qwen2vl::cpu
