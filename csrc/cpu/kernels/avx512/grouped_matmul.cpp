#include <math.h>
#include <string.h>

// clang-format off: it is written in the names of simd.h
#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/simd/vector_decoder.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// Panels multiplied at once, rows of their tile: 24 sums, 4 weights and a broadcast fit 32 registers.
constexpr int kTilePanels = 4, kWideRows = 6, kThinRows = 12;

// --- activations ---

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

// --- weights ---

/// bytes * multipliers / 2^15, rounded, plus 128. multipliers: the same 16-bit number twice a lane.
inline __m512i requantize(__m512i bytes, __m512i multipliers) {
  const __m512i even = _mm512_mulhrs_epi16(_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), multipliers);
  const __m512i odd = _mm512_mulhrs_epi16(_mm512_srai_epi16(bytes, 8), multipliers);
  const __m512i both = _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaau, _mm512_slli_epi16(odd, 8));
  return _mm512_xor_si512(both, _mm512_set1_epi8(-128));
}

/// q * multipliers - minima (with what rounds in it) in 16 bits, the upper half of it, plus 128. q: unsigned
/// bytes; the others: the same 16-bit number twice a lane.
inline __m512i requantize(__m512i q, __m512i multipliers, __m512i minima) {
  const auto product = [&](__m512i wide) {
    return _mm512_sub_epi16(_mm512_mullo_epi16(wide, multipliers), minima);
  };
  const __m512i even = _mm512_srli_epi16(product(_mm512_and_si512(q, _mm512_set1_epi16(0xff))), 8);
  const __m512i odd = product(_mm512_srli_epi16(q, 8));
  return _mm512_xor_si512(_mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaau, odd), _mm512_set1_epi8(-128));
}

inline Vec magnitude(Vec x) { return _mm512_and_ps(x, as_float(set1_int(0x7fffffff))); }

/// The number of every lane in both its halves.
inline __m512i twice(__m512i x) { return _mm512_mask_mov_epi16(x, 0xaaaaaaaau, _mm512_slli_epi32(x, 16)); }

/// `blocks` blocks of a panel from block `begin` on, as unsigned bytes with the offset 128, to out
/// [blocks * 8][16 rows][4], and their rows' common scales. The rules stand at KernelTable::matmul_groups.
template <DType T>
void requantize_panel(const PanelMatrix& w, int64_t panel, int64_t begin, int64_t blocks, uint8_t* out,
                      float* out_scales) {
  constexpr QuantFormat kFormat = traits_of(T).format;
  constexpr bool kMinimum = kFormat.has_minimum;
  constexpr int kParts = VectorDecoder<T>::kParts, kGroups = 8 / kParts,
                kShift = kFormat.is_signed() ? 0 : 8 - kFormat.bits();
  constexpr float kUnit = kMinimum ? 1.0f / 127 : 128.0f / 127 / (1 << kShift);
  static_assert(kMinimum || kFormat.is_signed() || kFormat.offset == 1 << (kFormat.bits() - 1));
  const VectorDecoder<T> decoder(w, panel);
  Vec scales[kGroupBlocks * kParts], minima[kMinimum ? kGroupBlocks : 1];
  Vec maximum = set1(0.0f);
  __mmask16 finite = 0xffff;
  const auto note = [&](Vec x) {
    finite &= _mm512_cmp_ps_mask(magnitude(x), set1(INFINITY), _CMP_LT_OQ);
    maximum = max(magnitude(x), maximum);
  };
  for (int64_t b = 0; b < blocks; ++b) {
    QWEN2VL_UNROLL
    for (int s = 0; s < kParts; ++s) {
      const Vec scale = scales[b * kParts + s] = decoder.scale(begin + b, s, 0);
      if constexpr (kMinimum) {
        minima[b] = decoder.minimum(begin + b, 0);
        note(minima[b]);
        note(sub(mul(scale, set1((1 << kFormat.bits()) - 1)), minima[b]));
      } else {
        note(scale);
      }
    }
  }
  const __mmask16 usable = finite & _mm512_cmp_ps_mask(maximum, set1(0.0f), _CMP_GT_OQ);
  const Vec inverse = _mm512_maskz_div_ps(usable, set1(kMinimum ? 127 * 256 : kGroupMultiplier), maximum);
  store(out_scales, _mm512_mask_mul_ps(set1(NAN), finite, maximum, set1(kUnit)));
  const auto multiplier = [&](Vec x) { return _mm512_maskz_cvtps_epi32(usable, mul(x, inverse)); };
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i minimum = _mm512_setzero_si512();
    if constexpr (kMinimum) minimum = twice(sub(multiplier(minima[b]), set1_int(1 << 7)));
    QWEN2VL_UNROLL
    for (int s = 0; s < kParts; ++s) {
      const __m512i scale = twice(multiplier(scales[b * kParts + s]));
      QWEN2VL_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const int group = s * kGroups + g;
        prefetch(decoder.group(begin + blocks + b, group, 0));
        __m512i bytes;
        if constexpr (kMinimum) {
          bytes = requantize(decoder.quants(begin + b, group, 0), scale, minimum);
        } else {
          bytes = decoder.template quants<kShift>(begin + b, group, 0);
          if constexpr (!kFormat.is_signed()) bytes = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
          bytes = requantize(bytes, scale);
        }
        _mm512_store_si512(out + (b * 8 + group) * kGroupBytes, bytes);
      }
    }
  }
}

// --- product ---

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
  auto* scales = reinterpret_cast<float*>(weights + kTilePanels * kPanelRows * kGroupColumns);
  float* sums = scales + kTilePanels * kPanelRows;
  for (int64_t g = 0; g < x.groups(); ++g) {
    const int64_t columns = x.columns(g), at = g * x.rows + t.task.row_begin;
    for (int p = 0; p < P; ++p)
      requantize_panel<T>(t.w, panel + p, g * kGroupBlocks, columns / kBlock32,
                          weights + p * kPanelRows * kGroupColumns, scales + p * kPanelRows);
    multiply_rows<P>(t.task.rows(), {x.values + at * kGroupColumns, x.scales + at, x.corrections + at,
                                     weights, scales, columns, sums, g == 0, g + 1 == x.groups(), t.out,
                                     t.task.row_begin, panel * kPanelRows, t.w.rows});
  }
}

template <DType T>
void multiply(const GroupedProblem& t) {
  int64_t panel = t.task.panel_begin;
  for (; panel + kTilePanels <= t.task.panel_end; panel += kTilePanels)
    multiply_panels<T, kTilePanels>(t, panel);
  for (; panel < t.task.panel_end; ++panel) multiply_panels<T, 1>(t, panel);
}

void matmul_groups(const PanelMatrix& w, const GroupedRows& x, const MatmulTask& task,
                   const MatmulOutput& out, std::byte* scratch) {
  const GroupedProblem t{w, x, task, out, scratch};
  visit_quantized(w.type, [&]<DType T>() { multiply<T>(t); });
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
