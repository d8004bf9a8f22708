// clang-format off: the templates are written in the names of simd.h
#include "cpu/kernels/neon/simd.h"
#include "cpu/kernels/simd/gemm.h"
#include "cpu/kernels/simd/unpack_panel.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::neon {
void add_gemm(KernelTable& table) {
  table.unpack_panel = unpack_panel;
  table.unpack_columns = unpack_columns;
  set_gemm_kernels(table);
}
}  // namespace qwen2vl::cpu::neon
