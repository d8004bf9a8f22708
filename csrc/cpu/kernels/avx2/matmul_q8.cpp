#include <string.h>

#include "cpu/kernels/avx2/simd.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// Tiles of 4 rows x 1 panel (two vectors). The 8 integer sums stay in the 16 registers with a vector's
/// weights; the float sums, wanted once a block, do not, and yet 4 rows measured faster than 2 or 3.
constexpr int kQ8TilePanels = 1;
constexpr int max_q8_tile_rows(int) { return 4; }

inline __m256i broadcast_group(const int8_t* x) {
  int32_t group;
  memcpy(&group, x, sizeof group);
  return _mm256_set1_epi32(group);
}

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/matmul_q8.h"

namespace qwen2vl::cpu {
namespace {

inline __m256i load_group(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

/// Sums of pairs of 16-bit lanes.
inline __m256i add_pairs(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

/// maddubs multiplies unsigned by signed bytes and adds pairs in 16 bits, saturating. Signed weights go in as
/// |w|, with w's sign on the activation: a pair is at most 2 * |w| * 127.
struct SignedWeights {
  __m256i magnitude, value;
};
inline SignedWeights signed_weights(__m256i w) { return {_mm256_abs_epi8(w), w}; }
inline __m256i multiply(const SignedWeights& w, __m256i x) {
  return _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.value));
}

/// Where vector v of a tile's panels begins, for parts with `bytes` per row.
inline int64_t vector_offset(int64_t panel_bytes, int v, int bytes) {
  return v / kVectorsPerPanel * panel_bytes + v % kVectorsPerPanel * kLanes * bytes;
}

/// Q8_0 and Q4_0: a scale per block.
struct BlockScales {
  static constexpr int kScales = 1;
  using Acc = __m256i;
  const uint8_t* quants;
  const uint8_t* scales;
  int64_t panel_bytes;

  BlockScales(const uint8_t* panel, const PanelMatrix& w)
      : quants(panel), scales(panel + panel_parts(w.type, w.cols).scales), panel_bytes(w.panel_bytes) {}
  Vec scale(int64_t b, int, int v) const {
    const uint8_t* p = scales + vector_offset(panel_bytes, v, 2) + b * kPanelRows * 2;
    return load_f16(reinterpret_cast<const uint16_t*>(p));
  }
  static Acc start(const int32_t*) { return _mm256_setzero_si256(); }
};

/// |q| <= 128: a pair is at most 32,512, so each is widened before it is added.
struct CodecQ8 : BlockScales {
  using BlockScales::BlockScales;
  using Weights = SignedWeights;
  Weights load(int64_t b, int g, int v) const {
    return signed_weights(load_group(quants + vector_offset(panel_bytes, v, 4) + (b * 8 + g) * kGroupBytes));
  }
  static Acc step(Acc acc, const Weights& w, __m256i x) {
    return chained(_mm256_add_epi32(acc, add_pairs(multiply(w, x))));
  }
  static Vec finish(Acc acc, const int32_t*) { return to_float(acc); }
};

/// Unsigned nibbles: a block's 8 groups add up in 16 bits (8 * 2 * 15 * 127 = 30,480). Offset 8 = 128 >> 4.
struct CodecQ4 : BlockScales {
  using BlockScales::BlockScales;
  using Weights = __m256i;
  Weights load(int64_t b, int g, int v) const {
    const __m256i q = load_group(quants + vector_offset(panel_bytes, v, 4) + (b * 4 + g % 4) * kGroupBytes);
    return _mm256_and_si256(g < 4 ? q : _mm256_srli_epi16(q, 4), _mm256_set1_epi8(0xf));
  }
  static Acc step(Acc acc, Weights w, __m256i x) {
    return chained(_mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x)));
  }
  static Vec finish(Acc acc, const int32_t* correction) {
    return to_float(_mm256_add_epi32(add_pairs(acc), _mm256_srai_epi32(_mm256_set1_epi32(*correction), 4)));
  }
};

/// -32..31, signed: a half block's 4 groups add up in 16 bits (4 * 2 * 32 * 127 = 32,512).
struct CodecQ6 {
  static constexpr int kScales = 2;
  using Acc = __m256i;
  using Weights = SignedWeights;
  const uint8_t* quants;
  const uint8_t* high;
  const uint8_t* subs;
  const uint8_t* supers;
  int64_t panel_bytes;

  CodecQ6(const uint8_t* panel, const PanelMatrix& w) : quants(panel), panel_bytes(w.panel_bytes) {
    const PanelParts parts = panel_parts(w.type, w.cols);
    high = panel + parts.high;
    subs = panel + parts.scales;
    supers = panel + parts.super;
  }
  Weights load(int64_t b, int g, int v) const {
    const int64_t at = vector_offset(panel_bytes, v, 4);
    const __m256i low = load_group(quants + at + (b * 4 + g % 4) * kGroupBytes);
    __m256i bits = load_group(high + at + (b * 2 + g % 2) * kGroupBytes);
    const int f = g / 2;  // bits 2 f and 2 f + 1, wanted at 4 and 5
    bits = f < 2 ? _mm256_slli_epi16(bits, 4 - 2 * f) : _mm256_srli_epi16(bits, 2 * f - 4);
    const __m256i nibble = _mm256_and_si256(g < 4 ? low : _mm256_srli_epi16(low, 4), _mm256_set1_epi8(0xf));
    const __m256i q = _mm256_or_si256(nibble, _mm256_and_si256(bits, _mm256_set1_epi8(0x30)));
    return signed_weights(_mm256_sub_epi8(q, _mm256_set1_epi8(32)));
  }
  Vec scale(int64_t b, int s, int v) const {
    const uint8_t* super = supers + vector_offset(panel_bytes, v, 2) + b / 8 * kPanelRows * 2;
    const uint8_t* sub = subs + vector_offset(panel_bytes, v, 1) + (b * 2 + s) * kPanelRows;
    return mul(load_f16(reinterpret_cast<const uint16_t*>(super)), to_float(load_int8(sub)));
  }
  static Acc start(const int32_t*) { return _mm256_setzero_si256(); }
  static Acc step(Acc acc, const Weights& w, __m256i x) {
    return chained(_mm256_add_epi16(acc, multiply(w, x)));
  }
  static Vec finish(Acc acc, const int32_t*) { return to_float(add_pairs(acc)); }
};

}  // namespace

namespace avx2 {
void add_matmul_q8(KernelTable& table) { set_q8_kernel<CodecQ8, CodecQ4, CodecQ6>(table); }
}  // namespace avx2
}  // namespace qwen2vl::cpu
