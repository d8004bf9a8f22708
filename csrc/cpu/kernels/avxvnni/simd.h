#pragma once

// AVX2's vectors, with AVX-VNNI's product.

#include "cpu/kernels/avx2/simd.h"

namespace qwen2vl::cpu {
namespace {

/// acc += products of the unsigned bytes of `w` and the signed bytes of `x`, four to a lane. As an intrinsic,
/// GCC 12 keeps a copy of every sum on the stack.
inline void dot_step(IntVec& acc, IntVec w, IntVec x) {
#if defined(__GNUC__)
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
#else
  acc = _mm256_dpbusd_avx_epi32(acc, w, x);
#endif
}

}  // namespace
}  // namespace qwen2vl::cpu
