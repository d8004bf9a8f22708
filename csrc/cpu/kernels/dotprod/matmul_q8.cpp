// clang-format off: it is written in the names of simd.h
#include "cpu/kernels/neon/simd.h"
#include "cpu/kernels/simd/vector_decoder.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// Tiles of 4 rows x 1 panel (four vectors): 16 integer sums, 4 weights and 4 rows' activations fit 32
/// registers; the float sums, wanted once a block, do not.
constexpr int kQ8TilePanels = 1;
constexpr int max_q8_tile_rows(int, int planes) { return planes == 2 ? 2 : 4; }

/// sdot multiplies signed bytes, and takes four of a row's activations from a lane. Weights with an offset go
/// in without it: all but 8-bit ones fit a signed byte, and the sums start from the correction, which takes
/// it off.
template <DType T>
struct Dot {
  static constexpr QuantFormat kFormat = traits_of(T).format;
  static constexpr int kRows = 1, kColumns = 4;
  using Weights = int8x16_t;
  using Activations = int8x16_t;  // 16 columns, for four steps
  using Acc = int32x4_t;

  static Weights weights(const auto& decoder, int64_t b, int g, int v) {
    return as_bytes(decoder.quants(b, g, v));
  }
  static void load(int8x16_t& x, const int8_t* part, int64_t, int g) {
    if (g % 4 == 0) x = vld1q_s8(part + 4 * g);
  }
  static Acc start(const int32_t* correction, int) {
    if constexpr (kFormat.offset == 0)
      return set1_int(0);
    else
      return set1_int(*correction / (128 / kFormat.offset));
  }
  static void step(Acc& acc, Weights w, int8x16_t x, int g) {
    switch (g % 4) {  // lanes are constants
      case 0:
        acc = vdotq_laneq_s32(acc, w, x, 0);
        break;
      case 1:
        acc = vdotq_laneq_s32(acc, w, x, 1);
        break;
      case 2:
        acc = vdotq_laneq_s32(acc, w, x, 2);
        break;
      default:
        acc = vdotq_laneq_s32(acc, w, x, 3);
    }
  }
  static IntVec finish(Acc acc, int, const int32_t*) { return acc; }
  static IntVec weighted(const Acc& first, const Acc& second, int row, const int32_t* corrections,
                         IntVec scales) {
    return weighted_sum(finish(first, row, corrections), finish(second, row, corrections + 1), scales);
  }
};

}  // namespace
}  // namespace qwen2vl::cpu

#include "cpu/kernels/simd/matmul_q8.h"

namespace qwen2vl::cpu::dotprod {
void add_matmul_q8(KernelTable& table) { table.matmul_q8 = matmul_q8; }
}  // namespace qwen2vl::cpu::dotprod
