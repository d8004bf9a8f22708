// clang-format off: the templates are written in the names of simd.h
#include "cpu/kernels/avxvnni/simd.h"
#include "cpu/kernels/simd/integer_gemm.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// 6 rows x 1 panel: 12 sums, 2 vectors of b and a broadcast fit 16 registers.
template <typename TA, typename TB>
struct Dot {
  using A = TA;
  using B = TB;
  static constexpr int kPanels = 1;
  static constexpr int max_rows(int) { return 6; }
};
struct Dot16 : Dot<int16_t, int16_t> {
  static IntVec step(IntVec acc, IntVec w, IntVec x) { return chained(_mm256_dpwssd_avx_epi32(acc, w, x)); }
};
struct Dot8 : Dot<uint8_t, int8_t> {
  static IntVec step(IntVec acc, IntVec w, IntVec x) { return chained(_mm256_dpbusd_avx_epi32(acc, x, w)); }
};

}  // namespace

namespace avxvnni {
void add_integer_gemm(KernelTable& table) {
  table.has_i16_dot = table.has_u8_dot = true;
  table.gemm_i16 = integer_gemm<Dot16>;
  table.gemm_u8_i8 = integer_gemm<Dot8>;
}
}  // namespace avxvnni
}  // namespace qwen2vl::cpu
