#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// Two rows of a panel side by side: [16][2] in bf16.
inline __m512i pair_rows(Vec first, Vec second, __m512i order) {
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}

void pair_f16_panel(const uint16_t* panel, int64_t depth, uint16_t* out) {
  // Of 32 values, the first row's 16 and then the second's: 0, 16, 1, 17, ...
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i order = bit_or(lane, shift_left(add(lane, set1_int(16)), 16));
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2) {
    const uint16_t* rows = panel + k * kPanelRows;
    _mm512_storeu_si512(out + k * kPanelRows, pair_rows(load_f16(rows), load_f16(rows + kPanelRows), order));
  }
  if (k < depth)
    _mm512_storeu_si512(out + k * kPanelRows, pair_rows(load_f16(panel + k * kPanelRows), set1(0.0f), order));
}

}  // namespace

namespace avx512bf16 {

void add_pair_panel(KernelTable& table) { table.pair_f16_panel = pair_f16_panel; }

}  // namespace avx512bf16
}  // namespace qwen2vl::cpu
