#pragma once

// What a kernel may ask of the chip, in one place: everything that is not plain C++ goes through these names.
// Under nvcc they are instructions; with QWEN2VL_STAND_IN a C++ compiler builds the same kernels for a
// stand-in of the chip (tests/native/stand_in/chip.h), which runs them thread by thread and checks what they
// do.
//
// Threads, blocks and barriers keep CUDA's spelling: threadIdx, blockIdx, blockDim, gridDim, __syncthreads,
// __syncwarp, __shfl_sync, __shfl_xor_sync, __threadfence, atomicAdd, float2, float4, uint2, uint4, make_*.

#include <cstddef>
#include <cstdint>

#ifdef QWEN2VL_STAND_IN
#include "stand_in/chip.h"
#else

#include <cuda_runtime.h>

#define CHIP_KERNEL static __global__
#define CHIP_DEVICE __device__ __forceinline__
#define CHIP_HOST_DEVICE __host__ __device__ __forceinline__
/// A block has `threads` threads at most; `blocks` of them are to fit on a multiprocessor.
#define CHIP_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)

namespace qwen2vl::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// --- shared memory -----------------------------------------------------------------------------------------

/// A pointer into the block's shared memory: indexing and pointer arithmetic. The stand-in checks each
/// access.
template <typename T>
using Shared = T*;

/// The dynamic shared memory of the block, 1,024-byte aligned.
CHIP_DEVICE Shared<uint8_t> shared_memory() {
  extern __shared__ __align__(1024) uint8_t chip_shared_bytes[];
  return chip_shared_bytes;
}

/// The same address as another type's.
template <typename T, typename U>
CHIP_DEVICE Shared<T> shared_cast(U* pointer) {
  return reinterpret_cast<T*>(pointer);
}

template <typename T>
CHIP_DEVICE unsigned shared_address(const T* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// --- numbers -----------------------------------------------------------------------------------------------

/// Two values as f16 or bf16 in one word, the first in the low half; round to nearest even. f16 saturates at
/// its largest finite value.
CHIP_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t word;
  low = fminf(fmaxf(low, -65504.0f), 65504.0f);
  high = fminf(fmaxf(high, -65504.0f), 65504.0f);
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
/// Of values that f16 holds (probabilities): nothing to saturate.
CHIP_DEVICE uint32_t pack_small_f16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
CHIP_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
CHIP_DEVICE float2 unpack_f16(uint32_t word) {
  float2 v;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(word));
  return v;
}
CHIP_DEVICE float2 unpack_bf16(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

/// Both halves as bf16: a - b, where the difference is a bf16 (no rounding is left to choose).
CHIP_DEVICE uint32_t subtract_bf16(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
  return d;
}

/// (x & mask) | bits in one instruction; of two constants the compiler would make two.
CHIP_DEVICE uint32_t mask_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t word;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(word) : "r"(x), "r"(mask), "r"(bits));
  return word;
}

/// Four bytes of a (0..3) and b (4..7), by the low four nibbles of `which`, each 0..7.
CHIP_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t which) {
  return __byte_perm(a, b, which);
}

CHIP_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- matrices ----------------------------------------------------------------------------------------------

/// c[16][8] += a[16][16] b[16][8] over a warp; lane 4 g + t holds c[g][2t], c[g][2t+1], c[g+8][2t],
/// c[g+8][2t+1]; a: words (g; 2t, 2t+1), (g+8; same), (g; 2t+8, 2t+9), (g+8; same); b: words (2t, 2t+1; g),
/// (2t+8, 2t+9; g).
CHIP_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
CHIP_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// c = a b: sums that begin with zeros need none in registers.
CHIP_DEVICE void mma_bf16_first(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

/// Four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes),
/// and gets of each matrix the word at row lane / 4, columns 2 (lane % 4) and + 1; transposed: of its
/// transpose.
CHIP_DEVICE void load_matrices(uint32_t (&r)[4], Shared<const uint16_t> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
CHIP_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared<const uint16_t> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// --- copies ------------------------------------------------------------------------------------------------

/// Starts a copy of 16 bytes into shared memory; zeros where not `valid` (the source is then not read).
/// Copies become visible to the thread that made them after copy_wait, to others after a barrier behind it.
CHIP_DEVICE void copy_async(Shared<uint4> to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
CHIP_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until at most `pending` of this thread's committed groups are unfinished.
template <int pending>
CHIP_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/// 16 bytes of weights, read once: they need not stay in the first-level cache.
CHIP_DEVICE uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
CHIP_DEVICE uint2 load_once(const uint2* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
CHIP_DEVICE uint32_t load_once(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

// --- launches that overlap the one before ------------------------------------------------------------------

/// Until the launch before has ended and its writes are visible. What comes before must not depend on it.
CHIP_DEVICE void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// From here on the next launch may start (up to its wait).
CHIP_DEVICE void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace qwen2vl::cuda

#endif  // QWEN2VL_STAND_IN
