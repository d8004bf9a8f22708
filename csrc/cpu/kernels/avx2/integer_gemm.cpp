// clang-format off: the templates are written in the names of simd.h
#include "cpu/kernels/avx2/simd.h"
#include "cpu/kernels/simd/integer_gemm.h"
#include "cpu/kernels/simd/integer_rows.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu {
namespace {

/// 6 rows x 1 panel: 12 sums, 2 vectors of b, a broadcast and a product fit 16 registers.
struct Dot16 {
  using A = int16_t;
  using B = int16_t;
  static constexpr int kPanels = 1;
  static constexpr int max_rows(int) { return 6; }
  static IntVec step(IntVec acc, IntVec w, IntVec x) { return add(acc, _mm256_madd_epi16(w, x)); }
};

}  // namespace

namespace avx2 {
void add_integer_gemm(KernelTable& table) {
  table.has_i16_dot = true;
  table.gemm_i16 = integer_gemm<Dot16>;
  set_integer_rows(table);
}
}  // namespace avx2
}  // namespace qwen2vl::cpu
