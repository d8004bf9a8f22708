#pragma once

// The one list of tensor types. From a line here, the type's Block (block_types.h) and its open_block
// (open_block.h) follow reading, packing and the kernels of every instruction set.

#include <cstddef>
#include <iterator>

#include "quant/block_types.h"

namespace qwen2vl {

inline constexpr DTypeTraits kDTypes[] = {
    {DType::F32, "F32", 1, 4},
    {DType::F16, "F16", 1, 2},
    {DType::BF16, "BF16", 1, 2},
    //                                                    bits: low high offset part scale minimum table
    {DType::Q4_0, "Q4_0", kBlock32, sizeof(Block<DType::Q4_0>), {4, 0, 8, 32, 16, false}},
    {DType::Q4_1, "Q4_1", kBlock32, sizeof(Block<DType::Q4_1>), {4, 0, 0, 32, 16, true}},
    {DType::Q5_0, "Q5_0", kBlock32, sizeof(Block<DType::Q5_0>), {4, 1, 16, 32, 16, false}},
    {DType::Q5_1, "Q5_1", kBlock32, sizeof(Block<DType::Q5_1>), {4, 1, 0, 32, 16, true}},
    {DType::Q8_0, "Q8_0", kBlock32, sizeof(Block<DType::Q8_0>), {8, 0, 0, 32, 16, false}},
    {DType::Q2_K, "Q2_K", kBlock256, sizeof(Block<DType::Q2_K>), {2, 0, 0, 16, 4, true}},
    {DType::Q3_K, "Q3_K", kBlock256, sizeof(Block<DType::Q3_K>), {3, 0, 4, 16, 8, false}},
    {DType::Q4_K, "Q4_K", kBlock256, sizeof(Block<DType::Q4_K>), {4, 0, 0, 32, 8, true}},
    {DType::Q5_K, "Q5_K", kBlock256, sizeof(Block<DType::Q5_K>), {4, 1, 0, 32, 8, true}},
    {DType::Q6_K, "Q6_K", kBlock256, sizeof(Block<DType::Q6_K>), {4, 2, 32, 16, 8, false}},
    {DType::IQ4_NL, "IQ4_NL", kBlock32, sizeof(Block<DType::IQ4_NL>), {4, 0, 0, 32, 16, false, true}},
    {DType::IQ4_XS, "IQ4_XS", kBlock256, sizeof(Block<DType::IQ4_XS>), {4, 0, 0, 32, 8, false, true}},
};

/// Of constants alone. Not consteval: Clang 14 does not know a template lambda's constants there.
constexpr DTypeTraits traits_of(DType type) {
  for (const DTypeTraits& traits : kDTypes)
    if (traits.type == type) return traits;
  throw "not in the list";
}

/// Throws std::invalid_argument.
[[noreturn]] void refuse_dtype(DType type, const char* expected);

/// fn.operator()<T>() with `type` as a constant T. It is compiled for every type of the list: what a type
/// lacks is an error of the compiler's.
template <size_t kIndex = 0, typename Fn>
void visit_dtype(DType type, const Fn& fn) {
  if constexpr (kIndex < std::size(kDTypes)) {
    constexpr DType kType = kDTypes[kIndex].type;
    if (type != kType) return visit_dtype<kIndex + 1>(type, fn);
    fn.template operator()<kType>();
  } else {
    refuse_dtype(type, "a type of the list");
  }
}

/// The same for the quantized types; others throw std::invalid_argument.
template <size_t kIndex = 0, typename Fn>
void visit_quantized(DType type, const Fn& fn) {
  if constexpr (kIndex < std::size(kDTypes)) {
    constexpr DType kType = kDTypes[kIndex].type;
    if (type != kType) return visit_quantized<kIndex + 1>(type, fn);
    if constexpr (kDTypes[kIndex].format.bits() != 0)
      fn.template operator()<kType>();
    else
      refuse_dtype(type, "a quantized one");
  } else {
    refuse_dtype(type, "a quantized one");
  }
}

/// Where in a quantized type's block d stands; m is behind it.
inline size_t d_offset(DType type) {
  size_t offset = 0;
  visit_quantized(type, [&]<DType T>() { offset = offsetof(Block<T>, d); });
  return offset;
}

}  // namespace qwen2vl
