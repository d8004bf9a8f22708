// clang-format off: it is written in the names of simd.h
#include "cpu/kernels/i8mm/simd.h"
#include "cpu/kernels/simd/vector_decoder.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// Tiles of 4 rows x 1 panel: 16 integer sums, 8 weights and 2 pairs of activations fit 32 registers; the
/// float sums, wanted once a block, do not.
constexpr int kQ8TilePanels = 1;
constexpr int max_q8_tile_rows(int, int planes) { return planes == 2 ? 2 : 4; }

/// Two vectors, each of two rows, eight columns of each.
using RowPairs = int8x16x2_t;

/// Of the i-th eight columns (0..3) of block b, the bytes that have them, kBits bits a value; their bits are
/// moved to `position`, what stands beside them is not cleared.
template <int kBits>
RowPairs pairs(const auto& decoder, const uint8_t* part, int64_t b, int i, int v, int position) {
  const uint8_t* at = decoder.template block<kBits>(part, b, v);
  IntVec first, second;
  if constexpr (kBits == 1) {  // four bytes a row: bit 2 i of four columns and bit 2 i + 1 of the next
    const IntVec bits = load_int(at), next = shift_right(bits, 1);
    first = low_by_turns(bits, next), second = high_by_turns(bits, next);
  } else {
    at += 2 * i % kBits * kGroupBytes;
    first = load_int(at), second = load_int(at + 16);
  }
  const int left = position - 2 * i / kBits * kBits;
  return {as_bytes(shifted(first, left)), as_bytes(shifted(second, left))};
}

/// smmla multiplies two rows of eight signed bytes with two others. Weights with an offset go in without it:
/// all but 8-bit ones fit a signed byte, and the correction takes it off.
template <DType T>
struct Dot {
  static constexpr QuantFormat kFormat = traits_of(T).format;
  static constexpr int kRows = 2, kColumns = 8;
  using Weights = RowPairs;
  using Activations = RowPairs;  // two rows' 16 columns, for two steps
  /// Of two rows of weights: the sums of the first row of activations, then of the second.
  using Acc = int32x4x2_t;

  static Weights weights(const auto& decoder, int64_t b, int i, int v) {
    constexpr int m = kFormat.low_bits, n = kFormat.high_bits;
    if constexpr (m == 3) {  // four bytes a row
      const IntVec four = decoder.quants(b, 2 * i, v), next = decoder.quants(b, 2 * i + 1, v);
      return {as_bytes(low_by_turns(four, next)), as_bytes(high_by_turns(four, next))};
    }
    RowPairs w = pairs<m>(decoder, decoder.low, b, i, v, 0);
    if constexpr (m == 8) return w;
    const IntVec mask = set1_bytes((1 << m) - 1);
    RowPairs high;
    if constexpr (n > 0) high = pairs<n>(decoder, decoder.high, b, i, v, m);
    QWEN2VL_UNROLL
    for (int j = 0; j < 2; ++j) {
      const IntVec bits = from_bytes(w.val[j]);
      if constexpr (n > 0)
        w.val[j] = as_bytes(merge_bits(bits, mask, from_bytes(high.val[j]), set1_bytes(((1 << n) - 1) << m)));
      else if constexpr (kFormat.has_table)
        w.val[j] = as_bytes(look_up(load_table(kIq4), bit_and(bits, mask)));
      else
        w.val[j] = as_bytes(bit_and(bits, mask));
    }
    return w;
  }
  static void load(RowPairs& x, const int8_t* part, int64_t next_row, int i) {
    if (i % 2 != 0) return;
    const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(part + 8 * i)),
                    second = vreinterpretq_s64_s8(vld1q_s8(part + next_row + 8 * i));
    x = {vreinterpretq_s8_s64(vzip1q_s64(first, second)), vreinterpretq_s8_s64(vzip2q_s64(first, second))};
  }
  static Acc start(const int32_t*, int) { return {set1_int(0), set1_int(0)}; }
  static void step(Acc& acc, const Weights& w, const RowPairs& x, int i) {
    acc.val[0] = vmmlaq_s32(acc.val[0], x.val[i % 2], w.val[0]);
    acc.val[1] = vmmlaq_s32(acc.val[1], x.val[i % 2], w.val[1]);
  }
  static IntVec finish(const Acc& acc, int row, const int32_t* correction) {
    const int64x2_t first = vreinterpretq_s64_s32(acc.val[0]), second = vreinterpretq_s64_s32(acc.val[1]);
    const IntVec sums =
        vreinterpretq_s32_s64(row == 0 ? vzip1q_s64(first, second) : vzip2q_s64(first, second));
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

namespace qwen2vl::cpu::i8mm {
void add_matmul_q8(KernelTable& table) {
  table.layout = {kPanelRun};
  table.matmul_q8 = matmul_q8;
}
}  // namespace qwen2vl::cpu::i8mm
