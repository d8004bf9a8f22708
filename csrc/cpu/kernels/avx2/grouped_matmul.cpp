#include <math.h>
#include <string.h>

#include <type_traits>

// clang-format off: it is written in the names of simd.h
#include "cpu/kernels/avx2/simd.h"
#include "cpu/kernels/simd/vector_decoder.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// Rows of a tile of one panel (two vectors): 12 sums in 16 bits, the weights, a broadcast and a product are
/// all 16 registers. The sums in 32 bits, wanted once a run, stay in memory.
constexpr int kTileRows = 6, kVectors = kVectorsPerPanel;

// --- activations ---

/// The rounding, and what becomes of tiny or non-finite groups: generic/grouped_matmul.cpp. n is a multiple
/// of 32.
void quantize_group(const float* x, int64_t n, const GroupedRows& out, int64_t at) {
  auto* values = reinterpret_cast<uint8_t*>(out.values) + at * kGroupColumns;
  int16_t* sums = out.sums + at * kGroupSums;
  // Compared as integers, magnitudes order as floats do, with infinity and NaN at the top.
  const __m256i magnitude = set1_int(0x7fffffff);
  __m256i m0 = _mm256_setzero_si256(), m1 = m0;
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    m0 = _mm256_max_epi32(m0, bit_and(load_int(reinterpret_cast<const uint8_t*>(x + i)), magnitude));
    m1 = _mm256_max_epi32(m1, bit_and(load_int(reinterpret_cast<const uint8_t*>(x + i + kLanes)), magnitude));
  }
  m0 = _mm256_max_epi32(m0, m1);
  __m128i bits4 = _mm_max_epi32(_mm256_castsi256_si128(m0), _mm256_extracti128_si256(m0, 1));
  bits4 = _mm_max_epi32(bits4, _mm_shuffle_epi32(bits4, 0x4e));
  bits4 = _mm_max_epi32(bits4, _mm_shuffle_epi32(bits4, 0xb1));
  const int32_t bits = _mm_cvtsi128_si32(bits4);
  const bool finite = bits < 0x7f800000;
  float maximum;
  memcpy(&maximum, &bits, sizeof maximum);
  const bool zeros = !finite || maximum < 1e-30f;
  out.scales[at] = !finite ? NAN : zeros ? 0.0f : maximum / 127.0f;
  if (zeros) {
    memset(values, 128, static_cast<size_t>(n));
    memset(sums, 0, kGroupSums * sizeof *sums);
    return;
  }
  const Vec by = set1(127.0f / maximum);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), bias = _mm256_set1_epi8(-128);
  for (int64_t i = 0; i < n; i += kBlock32) {
    __m256i q[4];
    for (int j = 0; j < 4; ++j) q[j] = to_int(mul(load(x + i + j * kLanes), by));
    // Packing works within 128-bit halves: the permutation puts the groups of four bytes back in order.
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const __m256i bytes = bit_xor(_mm256_permutevar8x32_epi32(packed, order), bias);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i), bytes);
    // Four sums of 8 bytes, each too large by 8 * 128.
    const __m256i eights = _mm256_sad_epu8(bytes, _mm256_setzero_si256());
    const __m256i halves = _mm256_add_epi64(eights, _mm256_shuffle_epi32(eights, 0x4e));
    const int first = _mm256_extract_epi32(halves, 0) - 2048, second = _mm256_extract_epi32(halves, 4) - 2048;
    sums[i / 16] = static_cast<int16_t>(first);
    sums[i / 16 + 1] = static_cast<int16_t>(second);
    sums[16 + i / 32] = static_cast<int16_t>(first + second);
  }
  for (int64_t i = n / 16; i < 16; ++i) sums[i] = sums[16 + i / 2] = 0;
}

void quantize_groups(const float* x, int64_t x_stride, int64_t rows, const GroupedRows& out,
                     int64_t row_begin) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t g = 0; g < out.groups(); ++g)
      quantize_group(x + i * x_stride + g * kGroupColumns, out.columns(g), out, g * out.rows + row_begin + i);
}

// --- weights ---

/// How a type's weights are multiplied: as signed codes of up to 6 bits, whose products with activations of 0
/// to 255 add up in 16 bits over a run of groups. A weight of 8 bits is two codes, 16 * high + low.
struct Codes {
  int planes;  ///< codes a weight
  int run;     ///< groups of 4 columns: of 4 bits 8, each bit more halves them
  int parts;   ///< of a block of 32 columns
  bool has_middle;
};

template <DType T>
constexpr Codes codes_of() {
  constexpr QuantFormat f = traits_of(T).format;
  constexpr int kBits = f.is_signed() || f.bits() < 4 ? 4 : f.bits();
  constexpr int kRun = 128 >> kBits, kPart = f.part / 4;
  static_assert(f.is_signed() || f.has_minimum || f.offset == 1 << (f.bits() - 1));
  static_assert(!f.is_signed() || f.part == kBlock32);
  return {f.is_signed() ? 2 : 1, kRun < kPart ? kRun : kPart, static_cast<int>(kBlock32) / f.part,
          f.has_minimum};
}

/// A group of a panel, unpacked for the tiles of all rows.
struct alignas(64) UnpackedGroup {
  int8_t codes[2 * kGroupColumns * kPanelRows];       // [blocks][planes][8][16 rows][4]
  int16_t scales[2 * kGroupBlocks * kPanelRows * 2];  // [blocks][planes][parts][16 rows], each twice
  int16_t middles[kGroupBlocks * kPanelRows * 2];     // [parts / 2][16 rows][2]
  int32_t start[kPanelRows];                          // takes back what the activations' 128 make
  float unit[kPanelRows], middle_unit[kPanelRows];
};

/// Parts' scales or middles as integers, the largest of them `limit`.
struct PartIntegers {
  Vec values[kGroupBlocks * 2];
  Vec maximum = set1(0.0f), bad = set1(0.0f), inverse;

  void note(int64_t i, Vec x) {
    values[i] = x;
    const Vec size = _mm256_and_ps(x, as_float(set1_int(0x7fffffff)));
    bad = _mm256_or_ps(bad, _mm256_cmp_ps(size, set1(INFINITY), _CMP_NLT_UQ));
    maximum = max(size, maximum);
  }
  /// What an integer stands for: NaN where a value is not finite.
  Vec finish(int32_t limit) {
    const Vec usable = _mm256_andnot_ps(bad, _mm256_cmp_ps(maximum, set1(0.0f), _CMP_GT_OQ));
    const Vec top = set1(static_cast<float>(limit));
    inverse = _mm256_and_ps(usable, div(top, maximum));
    return _mm256_blendv_ps(div(maximum, top), set1(NAN), bad);
  }
  __m256i integer(int64_t i) const {
    const Vec usable = _mm256_cmp_ps(inverse, set1(0.0f), _CMP_GT_OQ);
    return to_int(_mm256_and_ps(usable, mul(values[i], inverse)));
  }
};

/// Of 32-bit numbers: a's low half below, b's above.
inline __m256i pair(__m256i a, __m256i b) { return _mm256_blend_epi16(a, shift_left(b, 16), 0xaa); }

inline void store_int(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }

/// Signed codes of a group of 4 columns, [planes].
template <DType T>
inline void codes(__m256i q, __m256i (&out)[2]) {
  constexpr QuantFormat f = traits_of(T).format;
  if constexpr (f.is_signed()) {
    const __m256i eight = _mm256_set1_epi8(8), u = bit_xor(q, _mm256_set1_epi8(-128));
    const __m256i high = shift_right(_mm256_avg_epu8(u, _mm256_set1_epi8(7)), 3);  // (u + 8) / 16
    out[0] = _mm256_sub_epi8(bit_and(high, _mm256_set1_epi8(31)), eight);
    out[1] = _mm256_sub_epi8(bit_and(_mm256_add_epi8(u, eight), _mm256_set1_epi8(15)), eight);
  } else {
    out[0] = _mm256_sub_epi8(q, _mm256_set1_epi8(1 << (f.bits() - 1)));
  }
}

/// The rules stand at GroupRule::Scales.
template <DType T>
void unpack_group(const PanelMatrix& w, int64_t panel, int64_t begin, int64_t blocks, UnpackedGroup& out) {
  constexpr QuantFormat f = traits_of(T).format;
  constexpr Codes kCodes = codes_of<T>();
  constexpr int S = kCodes.parts, kPartGroups = 8 / S;
  const VectorDecoder<T> decoder(w, panel);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t lane = v * kLanes;
    PartIntegers scales, middles;
    for (int64_t b = 0; b < blocks; ++b) {
      QWEN2VL_UNROLL
      for (int s = 0; s < S; ++s) {
        const Vec scale = decoder.scale(begin + b, s, v);
        scales.note(b * S + s, scale);
        if constexpr (f.has_minimum)
          middles.note(b * S + s,
                       sub(mul(scale, set1(1 << (f.bits() - 1))), decoder.minimum(begin + b, s, v)));
      }
    }
    store(out.unit + lane, scales.finish(largest_group_scale(f)));
    if constexpr (f.has_minimum) {
      store(out.middle_unit + lane, middles.finish(INT16_MAX));
      constexpr int kPairs = kGroupBlocks * S / 2;
      const auto middle = [&](int64_t i) {
        return i < blocks * S ? middles.integer(i) : _mm256_setzero_si256();
      };
      for (int64_t i = 0; i < kPairs; ++i)
        store_int(out.middles + (i * kPanelRows + lane) * 2, pair(middle(2 * i), middle(2 * i + 1)));
    }
    __m256i start = _mm256_setzero_si256();
    for (int64_t b = 0; b < blocks; ++b) {
      QWEN2VL_UNROLL
      for (int s = 0; s < S; ++s) {
        const __m256i scale = scales.integer(b * S + s);
        __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        QWEN2VL_UNROLL
        for (int g = s * kPartGroups; g < (s + 1) * kPartGroups; ++g) {
          prefetch(decoder.group(begin + blocks + b, g, v));
          __m256i code[2];
          codes<T>(decoder.quants(begin + b, g, v), code);
          QWEN2VL_UNROLL
          for (int p = 0; p < kCodes.planes; ++p) {
            store_int(out.codes + ((b * kCodes.planes + p) * 8 + g) * kGroupBytes + lane * 4, code[p]);
            sums[p] = _mm256_add_epi16(sums[p], _mm256_maddubs_epi16(_mm256_set1_epi8(1), code[p]));
          }
        }
        QWEN2VL_UNROLL
        for (int p = 0; p < kCodes.planes; ++p) {
          const __m256i of_plane = p + 1 < kCodes.planes ? shift_left(scale, 4) : scale;
          const __m256i both = pair(of_plane, of_plane);
          store_int(out.scales + (((b * kCodes.planes + p) * S + s) * kPanelRows + lane) * 2, both);
          start = sub(start, shift_left(_mm256_madd_epi16(sums[p], both), 7));
        }
      }
    }
    store_int(out.start + lane, start);
  }
}

// --- product ---

/// What a tile multiplies: some rows of a group with an unpacked panel.
struct GroupTile {
  const uint8_t* x;       // [rows][kGroupColumns]
  const float* x_scales;  // [rows]
  const int16_t* x_sums;  // [rows][kGroupSums]
  const UnpackedGroup& weights;
  int64_t blocks;
  float* sums;  // [rows][16], of the groups before where this is not the first
  bool is_first, is_last;
  const MatmulOutput& out;  // where the sums go from the last group on: these rows, from `column` on
  int64_t row, column, n_cols;
};

inline __m256i load_int(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

inline __m256i broadcast4(const void* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return set1_int(four);
}

template <Codes kCodes, int R>
void multiply_tile(const GroupTile& t) {
  constexpr int V = kVectors, kRuns = 8 / kCodes.run;
  if (t.is_last) {
    QWEN2VL_UNROLL
    for (int r = 0; r < R; ++r) prefetch_output<1>(t.out, t.row + r, t.column);
  }
  __m256i sums[R][V];
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = load_int(t.weights.start + v * kLanes);
  }
  const int8_t* codes = t.weights.codes;
  const int16_t* scales = t.weights.scales;
  const uint8_t* x = t.x;
  // A plane a round: with both in one, GCC keeps all of a block's activations on the stack.
  for (int64_t n = 0; n < t.blocks * kCodes.planes; ++n) {
    QWEN2VL_UNROLL
    for (int i = 0; i < kRuns; ++i) {
      __m256i run[R][V];
      QWEN2VL_UNROLL
      for (int g = i * kCodes.run; g < (i + 1) * kCodes.run; ++g, codes += kGroupBytes) {
        __m256i w[V];
        QWEN2VL_UNROLL
        for (int v = 0; v < V; ++v) w[v] = load_int(codes + v * kLanes * 4);
        QWEN2VL_UNROLL
        for (int r = 0; r < R; ++r) {
          const __m256i four = broadcast4(x + r * kGroupColumns + 4 * g);
          QWEN2VL_UNROLL
          for (int v = 0; v < V; ++v) {
            const __m256i products = _mm256_maddubs_epi16(four, w[v]);
            run[r][v] = g % kCodes.run == 0 ? products : chained(_mm256_add_epi16(run[r][v], products));
          }
        }
      }
      const int16_t* scale = scales + i * kCodes.parts / kRuns * kPanelRows * 2;
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) {
        const __m256i both = load_int(scale + v * kLanes * 2);
        QWEN2VL_UNROLL
        for (int r = 0; r < R; ++r) sums[r][v] = add(sums[r][v], _mm256_madd_epi16(run[r][v], both));
      }
    }
    scales += kCodes.parts * kPanelRows * 2;
    if (kCodes.planes == 1 || n % kCodes.planes == kCodes.planes - 1) x += kBlock32;
  }
  QWEN2VL_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec x_scale = set1(t.x_scales[r]);
    float* before = t.sums + r * kPanelRows;
    Vec totals[V];
    QWEN2VL_UNROLL
    for (int v = 0; v < V; ++v) {
      const int64_t lane = v * kLanes;
      totals[v] = fma(to_float(sums[r][v]), mul(load(t.weights.unit + lane), x_scale),
                      t.is_first ? set1(0.0f) : load(before + lane));
      if constexpr (kCodes.has_middle) {
        const int16_t* x_sums = t.x_sums + r * kGroupSums + (kCodes.parts == 2 ? 0 : 16);
        __m256i middle = _mm256_setzero_si256();
        QWEN2VL_UNROLL
        for (int i = 0; i < kCodes.parts * kGroupBlocks / 2; ++i)
          middle = add(middle, _mm256_madd_epi16(broadcast4(x_sums + 2 * i),
                                                 load_int(t.weights.middles + (i * kPanelRows + lane) * 2)));
        totals[v] = fma(to_float(middle), mul(load(t.weights.middle_unit + lane), x_scale), totals[v]);
      }
    }
    if (t.is_last) {
      store_sums(t.out, t.row + r, t.column, t.n_cols, totals);
    } else {
      QWEN2VL_UNROLL
      for (int v = 0; v < V; ++v) store(before + v * kLanes, totals[v]);
    }
  }
}

template <Codes kCodes, int R = kTileRows>
void multiply_tile_of(int64_t rows, const GroupTile& t) {
  if (rows == R) return multiply_tile<kCodes, R>(t);
  if constexpr (R > 1) multiply_tile_of<kCodes, R - 1>(rows, t);
}

template <Codes kCodes>
void multiply_rows(int64_t rows, GroupTile t) {
  for (int64_t m = 0; m < rows;) {
    const int64_t part = even_part(rows, m, kTileRows);
    multiply_tile_of<kCodes>(part, t);
    m += part;
    t.x += part * kGroupColumns;
    t.x_scales += part;
    t.x_sums += part * kGroupSums;
    t.sums += part * kPanelRows;
    t.row += part;
  }
}

void matmul_groups(const PanelMatrix& w, const GroupedRows& x, const MatmulTask& task,
                   const MatmulOutput& out, std::byte* scratch) {
  auto* weights = reinterpret_cast<UnpackedGroup*>(scratch);
  auto* sums = reinterpret_cast<float*>(weights + 1);
  visit_quantized(w.type, [&]<DType T>() {
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      for (int64_t g = 0; g < x.groups(); ++g) {
        const int64_t blocks = x.columns(g) / kBlock32, at = g * x.rows + task.row_begin;
        unpack_group<T>(w, panel, g * kGroupBlocks, blocks, *weights);
        multiply_rows<codes_of<T>()>(
            task.rows(), {reinterpret_cast<const uint8_t*>(x.values) + at * kGroupColumns, x.scales + at,
                          x.sums + at * kGroupSums, *weights, blocks, sums, g == 0, g + 1 == x.groups(), out,
                          task.row_begin, panel * kPanelRows, w.rows});
      }
    }
  });
}

}  // namespace

namespace avx2 {
void add_grouped_matmul(KernelTable& table) {
  table.has_grouped_matmul = true;
  table.group_rule = GroupRule::Scales;
  table.quantize_groups = quantize_groups;
  table.matmul_groups = matmul_groups;
}
}  // namespace avx2
}  // namespace qwen2vl::cpu
