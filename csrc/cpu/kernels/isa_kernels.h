#pragma once

#include "cpu/kernels/kernel_table.h"

/// One namespace per instruction set, filled by the files of the folder of that name: each function puts the
/// kernels of its file into the table. The table starts as the generic one, so that what a set does not
/// speed up stays generic. Nothing else in those folders has external linkage: an inline function or a
/// template instance compiled for one processor could be picked by the linker to serve the others.
namespace qwen2vl::cpu {

namespace generic {
void add_quantize_rows(KernelTable& table);
void add_matmul_q8(KernelTable& table);
void add_grouped_matmul(KernelTable& table);
void add_gemm(KernelTable& table);  ///< unpack_* and gemm_*
void add_bf16_dot(KernelTable& table);
void add_pair_panel(KernelTable& table);
void add_integer_gemm(KernelTable& table);  ///< and what becomes of rows beside it
void add_rows(KernelTable& table);          ///< everything from rms_norm on
void add_peaks(KernelTable& table);
}  // namespace generic

namespace avx2 {
void add_quantize_rows(KernelTable& table);
void add_matmul_q8(KernelTable& table);
void add_grouped_matmul(KernelTable& table);
void add_gemm(KernelTable& table);
void add_integer_gemm(KernelTable& table);
void add_rows(KernelTable& table);
void add_peaks(KernelTable& table);
}  // namespace avx2

/// On top of avx2's table.
namespace avxvnni {
void add_integer_gemm(KernelTable& table);  ///< of it the products
void add_matmul_q8(KernelTable& table);
void add_grouped_matmul(KernelTable& table);
void add_peaks(KernelTable& table);  ///< int8_dot
}  // namespace avxvnni

namespace avx512 {
void add_quantize_rows(KernelTable& table);
void add_matmul_q8(KernelTable& table);
void add_grouped_matmul(KernelTable& table);
void add_gemm(KernelTable& table);
void add_integer_gemm(KernelTable& table);
void add_rows(KernelTable& table);
void add_peaks(KernelTable& table);
}  // namespace avx512

/// On top of avx512's table.
namespace avx512bf16 {
void add_bf16_dot(KernelTable& table);
void add_pair_panel(KernelTable& table);
void add_peaks(KernelTable& table);  ///< float_dot
}  // namespace avx512bf16

namespace neon {
void add_quantize_rows(KernelTable& table);
void add_matmul_q8(KernelTable& table);
void add_gemm(KernelTable& table);
void add_rows(KernelTable& table);
void add_peaks(KernelTable& table);
}  // namespace neon

/// On top of neon's table.
namespace dotprod {
void add_matmul_q8(KernelTable& table);
void add_peaks(KernelTable& table);  ///< int8_dot
}  // namespace dotprod

/// On top of dotprod's table.
namespace i8mm {
void add_matmul_q8(KernelTable& table);  ///< and the layout, which the plain kernels follow
void add_unpack_panel(KernelTable& table);
void add_bf16_dot(KernelTable& table);  ///< and pair_f16_panel
void add_peaks(KernelTable& table);     ///< int8_dot, float_dot
}  // namespace i8mm

}  // namespace qwen2vl::cpu
