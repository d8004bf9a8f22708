#include "quant/block_types.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

namespace qwen2vl {
namespace {

constexpr DTypeTraits kTraits[] = {
    {DType::F32, "F32", 1, sizeof(float)},
    {DType::F16, "F16", 1, sizeof(uint16_t)},
    {DType::BF16, "BF16", 1, sizeof(uint16_t)},
    {DType::Q4_0, "Q4_0", kBlock32, sizeof(BlockQ4_0)},
    {DType::Q8_0, "Q8_0", kBlock32, sizeof(BlockQ8_0)},
    {DType::Q6_K, "Q6_K", kBlock256, sizeof(BlockQ6_K)},
};

template <typename Predicate>
const DTypeTraits* find(const Predicate& predicate) {
  const auto* found = std::find_if(std::begin(kTraits), std::end(kTraits), predicate);
  return found == std::end(kTraits) ? nullptr : found;
}

char upper(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; }

}  // namespace

const DTypeTraits* find_dtype(uint32_t gguf_type) {
  return find([&](const DTypeTraits& traits) { return static_cast<uint32_t>(traits.type) == gguf_type; });
}

const DTypeTraits* find_dtype(std::string_view name) {
  return find([&](const DTypeTraits& traits) {
    return std::equal(name.begin(), name.end(), traits.name.begin(), traits.name.end(),
                      [](char a, char b) { return upper(a) == b; });
  });
}

std::string dtype_names() {
  std::string names;
  for (const DTypeTraits& traits : kTraits) names += (names.empty() ? "" : ", ") + std::string(traits.name);
  return names;
}

const DTypeTraits& dtype_traits(DType type) {
  const DTypeTraits* traits = find_dtype(static_cast<uint32_t>(type));
  if (traits == nullptr) {
    throw std::invalid_argument("no tensor type has the number " +
                                std::to_string(static_cast<uint32_t>(type)));
  }
  return *traits;
}

int64_t row_bytes(DType type, int64_t cols) {
  const DTypeTraits& traits = dtype_traits(type);
  if (cols < 0 || cols % traits.block_elements != 0) {
    throw std::invalid_argument(
        "a row of " + std::to_string(cols) + " values does not divide into blocks of " +
        std::to_string(traits.block_elements) + " (" + std::string(traits.name) + ")");
  }
  return cols / traits.block_elements * traits.block_bytes;
}

}  // namespace qwen2vl
