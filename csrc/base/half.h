#pragma once

#include <bit>
#include <cstdint>

namespace qwen2vl {

/// IEEE 754 binary16 to binary32, exact for every input (NaN payloads kept). Without branches, so that loops
/// of it vectorize.
inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & (0x1fu << 23);
  // Of subnormals, behind the leading 1 of 2^-14, which is taken away again.
  const float above = std::bit_cast<float>(magnitude + (113u << 23));
  const uint32_t subnormal = std::bit_cast<uint32_t>(above - std::bit_cast<float>(113u << 23));
  // Masks, since a compiler that may not skip a trap makes branches of choices between floats.
  const uint32_t is_subnormal = 0u - static_cast<uint32_t>(exponent == 0);
  const uint32_t is_special = 0u - static_cast<uint32_t>(exponent == 0x1fu << 23);  // infinity, NaN
  const uint32_t normal = magnitude + (112u << 23) + (is_special & (112u << 23));
  return std::bit_cast<float>(sign | (is_subnormal & subnormal) | (~is_subnormal & normal));
}

/// binary32 to binary16, round to nearest even; overflow goes to infinity, NaN stays NaN (quiet). Without
/// branches, so that loops of it vectorize.
inline uint16_t f32_to_f16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Subnormal results are multiples of 2^-24, which is the last place of 0.5: the addition rounds.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;               // 2^-14
  return static_cast<uint16_t>(sign | (magnitude < 0x477ff000u ? finite : special));  // 65520
}

inline float bf16_to_f32(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  return std::bit_cast<float>(bits);
}

/// binary32 to bfloat16, round to nearest even; NaN stays NaN (quiet).
inline uint16_t f32_to_bf16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 64u);
  return static_cast<uint16_t>((bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16);
}

}  // namespace qwen2vl
