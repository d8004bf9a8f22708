#include <bit>

#include "cpu/kernels/avx2/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/vector_decoder.h"
#include "quant/formats.h"

namespace qwen2vl::cpu {
namespace {

/// Tiles of 4 rows x 1 panel (two vectors). The 8 integer sums stay in the 16 registers with a vector's
/// weights; the float sums, wanted once a block, do not, and yet 4 rows measured faster than 2 or 3.
constexpr int kQ8TilePanels = 1;
constexpr int max_q8_tile_rows(int, int planes) { return planes == 2 ? 2 : 4; }

/// Sums of pairs of 16-bit lanes.
inline __m256i add_pairs(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

/// maddubs multiplies unsigned by signed bytes and adds pairs in 16 bits, saturating; as many groups as fit
/// add up there. Signed weights, of which none would, go in as |w| with w's sign on the activation, or, where
/// none is -128, as w with the activation's sign on |x|, which all rows of weights share.
template <DType T>
struct Dot {
  static constexpr QuantFormat kFormat = traits_of(T).format;
  static constexpr bool kSigned = kFormat.is_signed();
  static constexpr int kLargest = kSigned ? 128 : (1 << kFormat.bits()) - 1;
  static constexpr int kGroups = kFormat.part / 4;
  static constexpr int kRun = static_cast<int>(std::bit_floor(unsigned{INT16_MAX / (2 * kLargest * 127)}));
  static constexpr bool kNarrow = kRun >= kGroups;  // a whole part fits
  static constexpr int kRows = 1, kColumns = 4;

  struct Signed {
    __m256i magnitude, value;
  };
  using Weights = Signed;
  using Activations = Signed;
  struct Acc {
    __m256i run, sums;  ///< 16 and 32 bits
  };

  static Weights weights(const auto& decoder, int64_t b, int g, int v) {
    const __m256i q = decoder.quants(b, g, v);
    return {kSigned && !kFormat.has_table ? _mm256_abs_epi8(q) : q, q};
  }
  static void load(Activations& x, const int8_t* part, int64_t, int g) {
    x.value = broadcast_group(part + 4 * g);
    if constexpr (kFormat.has_table) x.magnitude = _mm256_abs_epi8(x.value);
  }
  static Acc start(const int32_t*, int) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static void step(Acc& acc, const Weights& w, const Activations& x, int g) {
    const __m256i pairs =
        kFormat.has_table
            ? _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8(w.value, x.value))
            : _mm256_maddubs_epi16(w.magnitude, kSigned ? _mm256_sign_epi8(x.value, w.value) : x.value);
    acc.run = g % kRun == 0 ? pairs : chained(_mm256_add_epi16(acc.run, pairs));
    if (!kNarrow && g % kRun == kRun - 1) acc.sums = chained(_mm256_add_epi32(acc.sums, add_pairs(acc.run)));
  }
  static IntVec finish(const Acc& acc, int, const int32_t* correction) {
    const __m256i sums = kNarrow ? add_pairs(acc.run) : acc.sums;
    if constexpr (kFormat.offset == 0) return sums;
    constexpr int kShift = 7 - std::countr_zero(unsigned{kFormat.offset});
    return _mm256_add_epi32(sums, _mm256_srai_epi32(_mm256_set1_epi32(*correction), kShift));
  }
  /// What widens a run multiplies by its part's scale.
  static IntVec weighted(const Acc& first, const Acc& second, int, const int32_t* corrections,
                         IntVec scales) {
    static_assert(kNarrow);
    const __m256i low = _mm256_setr_epi32(0x01000100, 0x05040504, 0x09080908, 0x0d0c0d0c, 0x01000100,
                                          0x05040504, 0x09080908, 0x0d0c0d0c),
                  high = _mm256_setr_epi32(0x03020302, 0x07060706, 0x0b0a0b0a, 0x0f0e0f0e, 0x03020302,
                                           0x07060706, 0x0b0a0b0a, 0x0f0e0f0e);
    const __m256i sums = _mm256_add_epi32(_mm256_madd_epi16(first.run, _mm256_shuffle_epi8(scales, low)),
                                          _mm256_madd_epi16(second.run, _mm256_shuffle_epi8(scales, high)));
    if constexpr (kFormat.offset == 0) return sums;
    return _mm256_add_epi32(sums, _mm256_madd_epi16(scales, minus_sums<kFormat.offset>(corrections)));
  }
};

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/matmul_q8.h"

namespace qwen2vl::cpu::avx2 {
void add_matmul_q8(KernelTable& table) { table.matmul_q8 = matmul_q8; }
}  // namespace qwen2vl::cpu::avx2
