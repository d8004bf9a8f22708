#pragma once

#include <cstdint>
#include <filesystem>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "base/input_file.h"

namespace qwen2vl::gguf {

/// A metadata array: elements of one scalar kind, or strings (views of what the Part keeps).
using Array = std::variant<std::vector<int64_t>, std::vector<uint64_t>, std::vector<double>,
                           std::vector<bool>, std::vector<std::string_view>>;

/// A metadata value. Integers are widened to 64 bit (signed stay signed), floats to double.
using Value = std::variant<int64_t, uint64_t, double, bool, std::string_view, Array>;

struct Key {
  std::string_view name;
  Value value;
  uint64_t offset;   ///< of its entry (name, type, value), from the start of the file
  uint64_t n_bytes;  ///< of its entry
};

struct Tensor {
  std::string_view name;
  uint32_t type;               ///< GGUF type number; checked to be a type that GGUF defines
  std::vector<int64_t> shape;  ///< numpy order: outermost first, the row (contiguous) length last
  uint64_t offset;             ///< of the data, from the start of `input`
  uint64_t data_bytes;         ///< which the file has, and which no other tensor's overlap
  const InputFile* input;
};

class Cursor;

/// One GGUF file (version 2 or 3, little-endian) as it lies on disk. Every length, count, offset, type and
/// alignment is checked against the file's size before it is used; a FormatError names the file, the key or
/// tensor, what was expected and what was found; UnsupportedError tells of versions and types that GGUF has
/// withdrawn.
struct Part {
  explicit Part(const std::filesystem::path& path);

  const Value* find(std::string_view key) const;  ///< nullptr where absent

  InputFile input;
  std::vector<std::vector<uint8_t>> header;  // names and strings are views of it
  uint32_t version = 0;
  uint64_t alignment = 32;
  std::vector<Key> keys;  // in file order, as the tensors
  std::unordered_map<std::string_view, size_t> key_index;
  std::vector<Tensor> tensors;

 private:
  void place_tensors(Cursor& in);
  void require_apart() const;
};

}  // namespace qwen2vl::gguf
