// clang-format off: the templates are written in the names of simd.h
#include "cpu/kernels/neon/simd.h"
#include "cpu/kernels/simd/rows.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::neon {
void add_rows(KernelTable& table) { set_row_kernels(table); }
}  // namespace qwen2vl::cpu::neon
