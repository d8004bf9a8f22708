// clang-format off: tile.h is written in the names of simd.h
#include "cpu/kernels/avxvnni/simd.h"
#include "cpu/kernels/simd/tile.h"
// clang-format on
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::avxvnni {
namespace {

/// Every loop over the sums is unrolled: one that is not keeps them on the stack, in the others too.
double int8_dot(int64_t iterations) {
  constexpr int kChains = 12;  // latency 4 to 5, two a cycle, 16 registers
  IntVec acc[kChains];
  QWEN2VL_UNROLL
  for (int j = 0; j < kChains; ++j) acc[j] = set1_int(j);
  const IntVec x = set1_int(static_cast<int>(iterations)), y = set1_int(0x03030303);
  for (int64_t i = 0; i < iterations; ++i) {
    QWEN2VL_UNROLL
    for (int j = 0; j < kChains; ++j) dot_step(acc[j], x, y);
  }
  QWEN2VL_UNROLL
  for (int j = 1; j < kChains; ++j) acc[0] = add(acc[0], acc[j]);
  volatile int sink = _mm256_extract_epi32(acc[0], 0);
  (void)sink;
  return static_cast<double>(iterations) * kChains * 32 * 2;
}

}  // namespace

void add_peaks(KernelTable& table) { table.peaks.int8_dot = int8_dot; }

}  // namespace qwen2vl::cpu::avxvnni
