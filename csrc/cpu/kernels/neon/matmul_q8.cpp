#include <bit>

// clang-format off: it is written in the names of simd.h
#include "cpu/kernels/neon/simd.h"
#include "cpu/kernels/simd/vector_decoder.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// Tiles of 2 rows x 1 panel (four vectors): 16 registers of 16-bit sums, 4 of weights and a broadcast, with
/// room for the float sums.
constexpr int kQ8TilePanels = 1;
constexpr int max_q8_tile_rows(int, int planes) { return planes == 2 ? 1 : 2; }

/// smlal multiplies bytes and adds the products in 16 bits, where as many groups add up as fit. Weights with
/// an offset go in without it: all but 8-bit ones fit a signed byte, and the correction takes it off.
template <DType T>
struct Dot {
  static constexpr QuantFormat kFormat = traits_of(T).format;
  static constexpr int kLargest = kFormat.is_signed() ? 128 : (1 << kFormat.bits()) - 1;
  static constexpr int kGroups = kFormat.part / 4;
  static constexpr int kRun = static_cast<int>(std::bit_floor(unsigned{INT16_MAX / (kLargest * 127)}));
  static constexpr bool kNarrow = kRun >= kGroups;  // a whole part fits

  static constexpr int kRows = 1, kColumns = 4;

  using Weights = int8x16_t;
  using Activations = int8x16_t;
  /// Two rows a vector: 16 bits a column, 32 bits a pair of columns.
  struct Acc {
    int16x8_t low_run, high_run;
    int32x4_t low, high;
  };

  static Weights weights(const auto& decoder, int64_t b, int g, int v) {
    return as_bytes(decoder.quants(b, g, v));
  }
  static void load(int8x16_t& x, const int8_t* part, int64_t, int g) {
    x = as_bytes(broadcast_group(part + 4 * g));
  }
  static Acc start(const int32_t*, int) { return {vdupq_n_s16(0), vdupq_n_s16(0), set1_int(0), set1_int(0)}; }
  static void step(Acc& acc, Weights w, int8x16_t x, int g) {
    if (g % kRun == 0) {
      acc.low_run = vmull_s8(vget_low_s8(w), vget_low_s8(x));
      acc.high_run = vmull_high_s8(w, x);
    } else {
      acc.low_run = vmlal_s8(acc.low_run, vget_low_s8(w), vget_low_s8(x));
      acc.high_run = vmlal_high_s8(acc.high_run, w, x);
    }
    if (!kNarrow && g % kRun == kRun - 1) {
      acc.low = vpadalq_s16(acc.low, acc.low_run);
      acc.high = vpadalq_s16(acc.high, acc.high_run);
    }
  }
  static IntVec finish(const Acc& acc, int, const int32_t* correction) {
    const IntVec sums = kNarrow ? vpaddq_s32(vpaddlq_s16(acc.low_run), vpaddlq_s16(acc.high_run))
                                : vpaddq_s32(acc.low, acc.high);
    if constexpr (kFormat.offset == 0)
      return sums;
    else
      return add(sums, set1_int(*correction / (128 / kFormat.offset)));
  }
  static IntVec weighted(const Acc& first, const Acc& second, int row, const int32_t* corrections,
                         IntVec scales) {
    return weighted_sum(finish(first, row, corrections), finish(second, row, corrections + 1), scales);
  }
};

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/matmul_q8.h"

namespace qwen2vl::cpu::neon {
void add_matmul_q8(KernelTable& table) { table.matmul_q8 = matmul_q8; }
}  // namespace qwen2vl::cpu::neon
