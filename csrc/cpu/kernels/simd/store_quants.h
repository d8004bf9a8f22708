#pragma once

// Of the instruction sets of x86: needs AVX2.

#include <immintrin.h>

#include "cpu/kernels/kernel_table.h"

namespace qwen2vl::cpu {
namespace {

/// A block's integers and their corrections.
inline void store_quants(__m256i quants, const QuantizedRows& out, int64_t block) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.values + block * kBlock32), quants);
  // Four sums of 8 bytes, each too large by 8 * 128.
  const __m256i plus_128 = _mm256_xor_si256(quants, _mm256_set1_epi8(-128));
  const __m256i sums = _mm256_sad_epu8(plus_128, _mm256_setzero_si256());
  const __m256i pairs = _mm256_add_epi64(sums, _mm256_shuffle_epi32(sums, 0x4e));
  const int first = 2048 - _mm256_extract_epi32(pairs, 0), second = 2048 - _mm256_extract_epi32(pairs, 4);
  out.corrections16[2 * block] = 128 * first;
  out.corrections16[2 * block + 1] = 128 * second;
  out.corrections32[block] = 128 * (first + second);
}

}  // namespace
}  // namespace qwen2vl::cpu
