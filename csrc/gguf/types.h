#pragma once

#include <cstdint>
#include <string_view>

namespace qwen2vl::gguf {

/// How GGUF stores a tensor type: `block_elements` consecutive values of a row take `block_bytes` bytes.
struct StorageType {
  uint32_t number;        ///< ggml_type
  std::string_view name;  ///< as GGUF tools print it: "F32", "Q4_K", ...
  uint32_t block_elements;
  uint32_t block_bytes;
};

/// Every type that GGUF defines, computed with here or not; nullptr for a number that stands for none.
const StorageType* find_storage_type(uint32_t number);

/// The name of a type that GGUF once defined; empty for any other number.
std::string_view withdrawn_type(uint32_t number);

}  // namespace qwen2vl::gguf
