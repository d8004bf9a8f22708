#include <string.h>

#include <bit>

#include "cpu/kernels/avx2/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "quant/formats.h"

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

/// Sums of pairs of 16-bit lanes.
inline __m256i add_pairs(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

/// A part's products of weights of at most this size, pair by pair, add up to at most:
constexpr int largest_sum(const QuantFormat& format, int size) { return format.part / 4 * 2 * size * 127; }

/// maddubs multiplies unsigned by signed bytes and adds pairs in 16 bits, saturating. Weights whose parts add
/// up in 16 bits are taken as they are stored. Of others half their range is taken off, and they go in as |w|
/// with w's sign on the activation; where not even those add up, each pair is widened first.
template <DType T>
struct Dot {
  static constexpr QuantFormat kFormat = traits_of(T).format;
  static constexpr int kHalf = 1 << (kFormat.bits() - 1);
  static constexpr bool kUnsigned = largest_sum(kFormat, 2 * kHalf - 1) <= INT16_MAX;
  static constexpr bool kWidened = largest_sum(kFormat, kHalf) > INT16_MAX;
  /// What the weights here are too large by.
  static constexpr int kExcess = kUnsigned             ? kFormat.offset
                                 : kFormat.bits() == 8 ? 0
                                                       : kFormat.offset - kHalf;

  struct Weights {
    __m256i magnitude, value;
  };
  using Acc = __m256i;

  static Weights weights(__m256i q) {
    if constexpr (kUnsigned) return {q, q};
    const __m256i w = kFormat.bits() == 8 ? q : _mm256_sub_epi8(q, _mm256_set1_epi8(kHalf));
    return {_mm256_abs_epi8(w), w};
  }
  static Acc start(const int32_t*) { return _mm256_setzero_si256(); }
  static Acc step(Acc acc, const Weights& w, __m256i x) {
    if constexpr (!kUnsigned) x = _mm256_sign_epi8(x, w.value);
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, x);
    return chained(kWidened ? _mm256_add_epi32(acc, add_pairs(pairs)) : _mm256_add_epi16(acc, pairs));
  }
  static Vec finish(Acc acc, const int32_t* correction) {
    const __m256i sums = kWidened ? acc : add_pairs(acc);
    if constexpr (kExcess == 0) return to_float(sums);
    constexpr int kShift = 7 - std::countr_zero(static_cast<unsigned>(kExcess));
    const __m256i excess = _mm256_srai_epi32(_mm256_set1_epi32(*correction), kShift);
    return to_float(kExcess > 0 ? _mm256_add_epi32(sums, excess) : _mm256_sub_epi32(sums, excess));
  }
};

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/matmul_q8.h"

namespace qwen2vl::cpu::avx2 {
void add_matmul_q8(KernelTable& table) { table.matmul_q8 = matmul_q8; }
}  // namespace qwen2vl::cpu::avx2
