#include "quant/block_types.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "quant/formats.h"

namespace qwen2vl {
namespace {

template <typename Predicate>
const DTypeTraits* find(const Predicate& predicate) {
  const auto* found = std::find_if(std::begin(kDTypes), std::end(kDTypes), predicate);
  return found == std::end(kDTypes) ? nullptr : found;
}

template <typename Predicate>
std::string names_of(const Predicate& predicate) {
  std::string names;
  for (const DTypeTraits& traits : kDTypes)
    if (predicate(traits)) names += (names.empty() ? "" : ", ") + std::string(traits.name);
  return names;
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
  return names_of([](const DTypeTraits&) { return true; });
}

std::string written_dtype_names() {
  return names_of([](const DTypeTraits& traits) { return traits.is_written; });
}

void refuse_dtype(DType type, const char* expected) {
  const DTypeTraits* traits = find_dtype(static_cast<uint32_t>(type));
  throw std::invalid_argument(
      "tensor type " +
      (traits != nullptr ? std::string(traits->name) : std::to_string(static_cast<uint32_t>(type))) +
      ": expected " + expected);
}

const DTypeTraits& dtype_traits(DType type) {
  const DTypeTraits* traits = find_dtype(static_cast<uint32_t>(type));
  if (traits == nullptr) refuse_dtype(type, "a type of the list");
  return *traits;
}

bool is_quantized(DType type) { return dtype_traits(type).format.bits() != 0; }

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
