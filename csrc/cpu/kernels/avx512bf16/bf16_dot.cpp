#include <string.h>

// clang-format off: tile.h is written in the names of simd.h
#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/simd/bf16_softmax.h"
#include "cpu/kernels/simd/tile.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

inline __m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }

/// The operands of one call.
struct PairProblem {
  const uint16_t* a;
  int64_t a_stride;
  const uint16_t* b;
  int64_t panel_stride, n_cols, depth;
  const MatmulOutput& out;
};

/// R rows from m, P panels from `panel`: R * P accumulators, one weight vector and R broadcasts fit 32
/// registers.
template <int R, int P>
void pair_tile(const PairProblem& t, int64_t m, int64_t panel) {
  const uint16_t* a = t.a + m * t.a_stride;
  const uint16_t* b = t.b + panel * t.panel_stride;
  Vec sums[R][P];
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    QWEN2VL_UNROLL
    for (int p = 0; p < P; ++p) sums[r][p] = set1(0.0f);
  }
  for (int64_t k = 0; k < t.depth; k += 2) {
    __m512bh w[P];
    QWEN2VL_UNROLL
    for (int p = 0; p < P; ++p) w[p] = as_bf16(_mm512_loadu_si512(b + p * t.panel_stride + k * kPanelRows));
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      memcpy(&pair, a + r * t.a_stride + k, sizeof pair);
      const __m512bh x = as_bf16(_mm512_set1_epi32(pair));
      QWEN2VL_UNROLL
      for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], w[p], x);
    }
  }
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) store_sums(t.out, m + r, panel * kPanelRows, t.n_cols, sums[r]);
}

template <int R, int P>
void pair_tile_of(int64_t rows, const PairProblem& t, int64_t m, int64_t panel) {
  if (rows == R) return pair_tile<R, P>(t, m, panel);
  if constexpr (R > 1) pair_tile_of<R - 1, P>(rows, t, m, panel);
}

/// Rows of a tile of P panels: at least 12 independent accumulators (latency 6, two a cycle), at most 25.
constexpr int pair_rows(int panels) { return panels == 1 ? 12 : panels == 2 ? 12 : panels <= 4 ? 6 : 5; }

template <int P>
void pair_rows_of(int64_t panels, int64_t rows, const PairProblem& t, int64_t panel) {
  if (panels == P) {
    for (int64_t m = 0; m < rows;) {
      const int64_t part = even_part(rows, m, pair_rows(P));
      pair_tile_of<pair_rows(P), P>(part, t, m, panel);
      m += part;
    }
    return;
  }
  if constexpr (P > 1) pair_rows_of<P - 1>(panels, rows, t, panel);
}

void gemm_bf16_pairs(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t panel_stride,
                     int64_t rows, int64_t n_cols, int64_t depth, const MatmulOutput& out) {
  const PairProblem t{a, a_stride, b, panel_stride, n_cols, depth, out};
  const int64_t panels = (n_cols + kPanelRows - 1) / kPanelRows;
  for (int64_t panel = 0; panel < panels;) {
    const int64_t part = even_part(panels, panel, 5);
    pair_rows_of<5>(part, rows, t, panel);
    panel += part;
  }
}

/// 2^x for x <= 0.
inline Vec exp2_coarse(Vec x) {
  const Vec whole = round_even(x), fraction = sub(x, whole);
  return _mm512_scalef_ps(exp2_fraction(fraction), whole);
}

inline float row_exponentials(const float* scores, int64_t n, Vec slope, Vec offset, uint16_t* out) {
  Vec s0 = set1(0.0f), s1 = s0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vec e0 = exp2_coarse(fma(load(scores + i), slope, offset));
    const Vec e1 = exp2_coarse(fma(load(scores + i + kLanes), slope, offset));
    s0 = add(s0, e0);
    s1 = add(s1, e1);
    _mm512_storeu_si512(out + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(e1, e0)));
  }
  for (; i < n; i += kLanes) {
    const int64_t lanes = n - i < kLanes ? n - i : kLanes;
    const __mmask16 mask = static_cast<__mmask16>((1u << lanes) - 1u);
    const Vec e =
        _mm512_maskz_mov_ps(mask, exp2_coarse(fma(_mm512_maskz_loadu_ps(mask, scores + i), slope, offset)));
    s0 = add(s0, e);
    _mm256_mask_storeu_epi16(out + i, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(e)));
  }
  return reduce_add(add(s0, s1));
}

void convert_f32_to_bf16(const float* x, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(x + i))));
  if (i < n) {
    const __m256bh rest = _mm512_cvtneps_pbh(load_first(x + i, n - i, set1(0.0f)));
    _mm256_mask_storeu_epi16(out + i, first_lanes(n - i), reinterpret_cast<__m256i>(rest));
  }
}

}  // namespace

namespace avx512bf16 {

void add_bf16_dot(KernelTable& table) {
  table.has_bf16_dot = true;
  table.gemm_bf16_pairs = gemm_bf16_pairs;
  table.softmax_steps_bf16 = softmax_steps_bf16;
  table.convert_f32_to_bf16 = convert_f32_to_bf16;
}

}  // namespace avx512bf16
}  // namespace qwen2vl::cpu
