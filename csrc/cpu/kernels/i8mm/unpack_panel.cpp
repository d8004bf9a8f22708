// clang-format off: the templates are written in the names of simd.h
#include "cpu/kernels/i8mm/simd.h"
#include "cpu/kernels/simd/unpack_panel.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::i8mm {
void add_unpack_panel(KernelTable& table) {
  table.unpack_panel = unpack_panel;
  table.unpack_columns = unpack_columns;
}
}  // namespace qwen2vl::cpu::i8mm
