#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "base/input_file.h"

namespace qwen2vl::gguf {

/// A metadata array: elements of one scalar kind, or strings (views of what the File keeps).
using Array = std::variant<std::vector<int64_t>, std::vector<uint64_t>, std::vector<double>,
                           std::vector<bool>, std::vector<std::string_view>>;

/// A metadata value. Integers are widened to 64 bit (signed stay signed), floats to double.
using Value = std::variant<int64_t, uint64_t, double, bool, std::string_view, Array>;

class Cursor;

struct Tensor {
  std::string_view name;
  uint32_t type;               ///< GGUF type number; checked to be a type that GGUF defines
  std::vector<int64_t> shape;  ///< numpy order: outermost first, the row (contiguous) length last
  uint64_t offset;             ///< of the data, from the start of the file
  uint64_t data_bytes;         ///< which the file has, and which no other tensor's overlap
};

/// A GGUF file (version 2 or 3, little-endian). Every length, count, offset, type and alignment is checked
/// against the file's size before it is used; a FormatError names the file, the key or tensor, what was
/// expected and what was found; UnsupportedError tells of versions and types that GGUF has withdrawn.
class File {
 public:
  explicit File(const std::filesystem::path& path);

  const std::string& path() const { return input_.name(); }  ///< as messages show it
  uint32_t version() const { return version_; }
  uint64_t alignment() const { return alignment_; }

  /// In file order.
  const std::vector<std::pair<std::string_view, Value>>& metadata() const { return metadata_; }
  const std::vector<Tensor>& tensors() const { return tensors_; }

  const Value* find(std::string_view key) const;           ///< nullptr where absent
  const Tensor* find_tensor(std::string_view name) const;  ///< nullptr where absent

  /// Typed look-ups. The first form throws FormatError where the key is absent; both throw where the value
  /// has another type or does not fit.
  int64_t get_int(std::string_view key) const;
  int64_t get_int(std::string_view key, int64_t fallback) const;
  double get_float(std::string_view key) const;
  double get_float(std::string_view key, double fallback) const;
  bool get_bool(std::string_view key, bool fallback) const;
  std::string_view get_string(std::string_view key) const;
  std::string_view get_string(std::string_view key, std::string_view fallback) const;
  std::vector<int64_t> get_ints(std::string_view key) const;   ///< any integer array
  std::vector<double> get_floats(std::string_view key) const;  ///< any number array

  const InputFile& input() const { return input_; }

 private:
  void place_tensors(Cursor& in);
  void require_apart() const;

  InputFile input_;
  std::vector<std::vector<uint8_t>> header_;  // keys and names are views of it
  uint32_t version_ = 0;
  uint64_t alignment_ = 32;
  std::vector<std::pair<std::string_view, Value>> metadata_;
  std::unordered_map<std::string_view, size_t> metadata_index_;
  std::vector<Tensor> tensors_;
  std::unordered_map<std::string_view, size_t> tensor_index_;
};

}  // namespace qwen2vl::gguf
