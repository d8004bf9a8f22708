#include <math.h>
#include <string.h>

// clang-format off: tile.h is written in the names of simd.h
#include "cpu/kernels/i8mm/simd.h"
#include "cpu/kernels/simd/bf16_softmax.h"
#include "cpu/kernels/simd/tile.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

inline bfloat16x8_t load_pairs(const uint16_t* p) { return vreinterpretq_bf16_u16(vld1q_u16(p)); }
inline void store_pairs(uint16_t* p, bfloat16x8_t v) { vst1q_u16(p, vreinterpretq_u16_bf16(v)); }
inline bfloat16x8_t to_bf16(Vec low, Vec high) { return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high); }

/// The operands of one call.
struct PairProblem {
  const uint16_t* a;
  int64_t a_stride;
  const uint16_t* b;
  int64_t panel_stride, n_cols, depth;
  const MatmulOutput& out;
};

/// R rows from m, P panels from `panel`: accumulators, a vector of weights and R pairs fit 32 registers as a
/// gemm tile's do.
template <int R, int P>
void pair_tile(const PairProblem& t, int64_t m, int64_t panel) {
  constexpr int V = P * kVectorsPerPanel;
  const uint16_t* a = t.a + m * t.a_stride;
  const uint16_t* b = t.b + panel * t.panel_stride;
  Vec sums[R][V];
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = set1(0.0f);
  }
  for (int64_t k = 0; k < t.depth; k += 2) {
    bfloat16x4_t x[R];
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) {
      uint32_t pair;
      memcpy(&pair, a + r * t.a_stride + k, sizeof pair);
      x[r] = vreinterpret_bf16_u32(vset_lane_u32(pair, vdup_n_u32(0), 0));
    }
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) {
      const int64_t row = k * kPanelRows + v % kVectorsPerPanel * 2 * kLanes;
      const bfloat16x8_t w = load_pairs(b + v / kVectorsPerPanel * t.panel_stride + row);
      QWEN2VL_UNROLL
      for (int r = 0; r < R; ++r) sums[r][v] = vbfdotq_lane_f32(sums[r][v], w, x[r], 0);
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

template <int P>
void pair_rows(int64_t rows, const PairProblem& t, int64_t panel) {
  constexpr int kRows = max_tile_rows(P);
  for (int64_t m = 0; m < rows;) {
    const int64_t part = even_part(rows, m, kRows);
    pair_tile_of<kRows, P>(part, t, m, panel);
    m += part;
  }
}

void gemm_bf16_pairs(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t panel_stride,
                     int64_t rows, int64_t n_cols, int64_t depth, const MatmulOutput& out) {
  const PairProblem t{a, a_stride, b, panel_stride, n_cols, depth, out};
  const int64_t panels = (n_cols + kPanelRows - 1) / kPanelRows;
  int64_t panel = 0;
  if (rows == 1)  // many panels at once, for enough independent sums
    for (; panels - panel >= kWidestThinTile; panel += kWidestThinTile)
      pair_rows<kWidestThinTile>(rows, t, panel);
  for (; panel < panels; ++panel) pair_rows<1>(rows, t, panel);
}

/// 2^x for x <= 0, not below 2^-126.
inline Vec exp2_coarse(Vec x) {
  x = max(x, set1(-126.0f));
  const Vec whole = round_even(x), fraction = sub(x, whole);
  return as_float(add(as_int(exp2_fraction(fraction)), shift_left(to_int(whole), 23)));
}

inline float row_exponentials(const float* scores, int64_t n, Vec slope, Vec offset, uint16_t* out) {
  constexpr int kStep = 2 * kLanes;
  Vec s0 = set1(0.0f), s1 = s0;
  const auto step = [&](const float* x, uint16_t* y) {
    const Vec e0 = exp2_coarse(fma(load(x), slope, offset));
    const Vec e1 = exp2_coarse(fma(load(x + kLanes), slope, offset));
    s0 = add(s0, e0);
    s1 = add(s1, e1);
    store_pairs(y, to_bf16(e0, e1));
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) step(scores + i, out + i);
  if (i < n) {
    float rest[kStep];
    uint16_t rounded[kStep];
    for (int j = 0; j < kStep; ++j) rest[j] = i + j < n ? scores[i + j] : -INFINITY;  // 2^-126
    step(rest, rounded);
    memcpy(out + i, rounded, static_cast<size_t>(n - i) * sizeof *out);
  }
  return reduce_add(add(s0, s1));
}

void convert_f32_to_bf16(const float* x, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    store_pairs(out + i, to_bf16(load(x + i), load(x + i + kLanes)));
  for (; i < n; ++i) {
    const bfloat16x4_t one = vcvt_bf16_f32(set1(x[i]));
    out[i] = vget_lane_u16(vreinterpret_u16_bf16(one), 0);
  }
}

void pair_f16_panel(const uint16_t* panel, int64_t depth, uint16_t* out) {
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t r = 0; r < kPanelRows; r += kLanes) {
      const uint16_t* at = panel + k * kPanelRows + r;
      const Vec second = k + 1 < depth ? load_f16(at + kPanelRows) : set1(0.0f);
      const uint16x8_t both = vreinterpretq_u16_bf16(to_bf16(load_f16(at), second));
      vst1q_u16(out + k * kPanelRows + 2 * r, vzip1q_u16(both, vextq_u16(both, both, 4)));
    }
  }
}

}  // namespace

namespace i8mm {
void add_bf16_dot(KernelTable& table) {
  table.has_bf16_dot = true;
  table.gemm_bf16_pairs = gemm_bf16_pairs;
  table.softmax_steps_bf16 = softmax_steps_bf16;
  table.convert_f32_to_bf16 = convert_f32_to_bf16;
  table.pair_f16_panel = pair_f16_panel;
}
}  // namespace i8mm
}  // namespace qwen2vl::cpu
