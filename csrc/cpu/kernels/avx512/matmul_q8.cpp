#include <string.h>

#include <bit>

#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "quant/formats.h"

namespace qwen2vl::cpu {
namespace {

/// Tiles of 6 rows x 2 panels: 12 integer and 12 float accumulators, 2 weight vectors, a broadcast and the
/// masks fit 32 registers; 8 loads feed 12 dot products (two of each a cycle). Per block and accumulator, the
/// two pipes of the 8 dot products also multiply and multiply-add the scales: 80 % of the peak is the
/// ceiling.
constexpr int kQ8TilePanels = 2;
/// Two planes have twice the integer sums: 4 rows.
constexpr int max_q8_tile_rows(int panels, int planes) { return planes == 2 ? 4 : panels == 2 ? 6 : 8; }

inline __m512i broadcast_group(const int8_t* x) {
  int32_t group;
  memcpy(&group, x, sizeof group);
  return _mm512_set1_epi32(group);
}

/// vpdpbusd multiplies unsigned by signed bytes: weights are made unsigned by an offset, and the sums start
/// from the correction, -offset * sum of the activations.
template <DType T>
struct Dot {
  static constexpr QuantFormat kFormat = traits_of(T).format;
  static constexpr int kOffset = kFormat.is_signed() ? 128 : kFormat.offset;
  static constexpr int kRows = 1, kColumns = 4;
  using Weights = __m512i;
  using Activations = __m512i;
  using Acc = __m512i;

  static Weights weights(const auto& decoder, int64_t b, int g, int v) {
    const __m512i q = decoder.quants(b, g, v);
    return kFormat.is_signed() ? _mm512_xor_si512(q, _mm512_set1_epi8(-128)) : q;
  }
  static void load(__m512i& x, const int8_t* part, int64_t, int g) { x = broadcast_group(part + 4 * g); }
  static Acc start(const int32_t* correction) {
    if constexpr (kOffset == 0) return _mm512_setzero_si512();
    constexpr unsigned kShift = 7 - std::countr_zero(unsigned{kOffset});
    return _mm512_srai_epi32(_mm512_set1_epi32(*correction), kShift);
  }
  static void step(Acc& acc, Weights w, __m512i x, int) { acc = _mm512_dpbusd_epi32(acc, w, x); }
  static IntVec finish(Acc acc, int, const int32_t*) { return acc; }
};

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/matmul_q8.h"

namespace qwen2vl::cpu::avx512 {
void add_matmul_q8(KernelTable& table) { table.matmul_q8 = matmul_q8; }
}  // namespace qwen2vl::cpu::avx512
