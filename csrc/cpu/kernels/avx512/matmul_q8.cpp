#include <string.h>

#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// Tiles of 6 rows x 2 panels: 12 integer and 12 float accumulators, 2 weight vectors, a broadcast and the
/// masks fit 32 registers; 8 loads feed 12 dot products (two of each a cycle). Per block and accumulator, the
/// two pipes of the 8 dot products also multiply and multiply-add the scales: 80 % of the peak is the
/// ceiling.
constexpr int kQ8TilePanels = 2;
constexpr int max_q8_tile_rows(int panels) { return panels == 2 ? 6 : 8; }

inline __m512i broadcast_group(const int8_t* x) {
  int32_t group;
  memcpy(&group, x, sizeof group);
  return _mm512_set1_epi32(group);
}

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/matmul_q8.h"

namespace qwen2vl::cpu {
namespace {

/// vpdpbusd multiplies unsigned by signed bytes: weights are made unsigned by an offset, and the sums start
/// from the correction, -offset * sum of the activations.
struct Dot {
  using Weights = __m512i;
  using Acc = __m512i;
  static Acc step(Acc acc, Weights w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static Vec finish(Acc acc, const int32_t*) { return _mm512_cvtepi32_ps(acc); }
};

struct CodecQ8 : Dot {
  static constexpr int kScales = 1;
  const uint8_t* quants;
  const uint8_t* scales;
  int64_t panel_bytes;

  CodecQ8(const uint8_t* panel, const PanelMatrix& w)
      : quants(panel), scales(panel + panel_parts(w.type, w.cols).scales), panel_bytes(w.panel_bytes) {}

  Weights load(int64_t b, int g, int v) const {  // q + 128
    const __m512i q = _mm512_loadu_si512(quants + v * panel_bytes + (b * 8 + g) * kGroupBytes);
    return _mm512_xor_si512(q, _mm512_set1_epi8(-128));
  }
  Vec scale(int64_t b, int, int v) const {
    return load_f16(reinterpret_cast<const uint16_t*>(scales + v * panel_bytes) + b * kPanelRows);
  }
  static Acc start(const int32_t* correction) { return _mm512_set1_epi32(*correction); }
};

struct CodecQ4 : Dot {
  static constexpr int kScales = 1;
  const uint8_t* quants;
  const uint8_t* scales;
  int64_t panel_bytes;

  CodecQ4(const uint8_t* panel, const PanelMatrix& w)
      : quants(panel), scales(panel + panel_parts(w.type, w.cols).scales), panel_bytes(w.panel_bytes) {}

  Weights load(int64_t b, int g, int v) const {  // q in 0..15, offset 8
    const __m512i q = _mm512_loadu_si512(quants + v * panel_bytes + (b * 4 + g % 4) * kGroupBytes);
    return _mm512_and_si512(g < 4 ? q : _mm512_srli_epi16(q, 4), _mm512_set1_epi8(0xf));
  }
  Vec scale(int64_t b, int, int v) const {
    return load_f16(reinterpret_cast<const uint16_t*>(scales + v * panel_bytes) + b * kPanelRows);
  }
  static Acc start(const int32_t* correction) {  // 128 = 8 << 4
    return _mm512_srai_epi32(_mm512_set1_epi32(*correction), 4);
  }
};

struct CodecQ6 : Dot {
  static constexpr int kScales = 2;
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

  Weights load(int64_t b, int g, int v) const {  // q in 0..63, offset 32
    const int64_t at = v * panel_bytes;
    const __m512i low = _mm512_loadu_si512(quants + at + (b * 4 + g % 4) * kGroupBytes);
    __m512i bits = _mm512_loadu_si512(high + at + (b * 2 + g % 2) * kGroupBytes);
    const int f = g / 2;  // bits 2 f and 2 f + 1, wanted at 4 and 5
    bits = f < 2 ? _mm512_slli_epi16(bits, 4 - 2 * f) : _mm512_srli_epi16(bits, 2 * f - 4);
    // (low nibble of either) with the two bits above: a & mask | b & ~mask, then the top two bits cleared.
    const __m512i nibble = g < 4 ? low : _mm512_srli_epi16(low, 4);
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0xf), nibble, bits, 0xca);
    return _mm512_and_si512(both, _mm512_set1_epi8(0x3f));
  }
  Vec scale(int64_t b, int s, int v) const {
    const Vec super =
        load_f16(reinterpret_cast<const uint16_t*>(supers + v * panel_bytes) + b / 8 * kPanelRows);
    return mul(super, to_float(load_int8(subs + v * panel_bytes + (b * 2 + s) * kPanelRows)));
  }
  static Acc start(const int32_t* correction) {  // 128 = 32 << 2
    return _mm512_srai_epi32(_mm512_set1_epi32(*correction), 2);
  }
};

}  // namespace

namespace avx512 {
void add_matmul_q8(KernelTable& table) { set_q8_kernel<CodecQ8, CodecQ4, CodecQ6>(table); }
}  // namespace avx512
}  // namespace qwen2vl::cpu
