// clang-format off: the templates are written in the names of simd.h
#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/simd/integer_gemm.h"
#include "cpu/kernels/simd/integer_rows.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// The tiles of gemm_bf16_pairs.
template <typename TA, typename TB>
struct Dot {
  using A = TA;
  using B = TB;
  static constexpr int kPanels = 5;
  static constexpr int max_rows(int panels) { return panels <= 2 ? 12 : panels <= 4 ? 6 : 5; }
};
struct Dot16 : Dot<int16_t, int16_t> {
  static IntVec step(IntVec acc, IntVec w, IntVec x) { return chained(_mm512_dpwssd_epi32(acc, w, x)); }
};
struct Dot8 : Dot<uint8_t, int8_t> {
  static IntVec step(IntVec acc, IntVec w, IntVec x) { return chained(_mm512_dpbusd_epi32(acc, x, w)); }
};

}  // namespace

namespace avx512 {
void add_integer_gemm(KernelTable& table) {
  table.has_i16_dot = table.has_u8_dot = true;
  table.gemm_i16 = integer_gemm<Dot16>;
  table.gemm_u8_i8 = integer_gemm<Dot8>;
  set_integer_rows(table);
}
}  // namespace avx512
}  // namespace qwen2vl::cpu
