#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "gguf/part.h"

namespace qwen2vl::gguf {

/// A GGUF file, or all of those that one was split in (NAME-00001-of-00003.gguf ..., keys split.*), of which
/// any may be named. Errors are those of Part, and FormatError where a part is missing, is one of another
/// file or lies under another's name.
class File {
 public:
  explicit File(const std::filesystem::path& path);

  const std::string& path() const { return first().input.name(); }  ///< as messages show it
  uint32_t version() const { return first().version; }
  uint64_t alignment() const { return first().alignment; }

  /// In file order; the keys are the first part's.
  const std::vector<Key>& keys() const { return first().keys; }
  const std::vector<Tensor>& tensors() const { return tensors_; }

  const Value* find(std::string_view key) const { return first().find(key); }  ///< nullptr where absent
  const Tensor* find_tensor(std::string_view name) const;                      ///< nullptr where absent

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

  /// What the file is on disk, in order.
  const std::vector<std::unique_ptr<Part>>& parts() const { return parts_; }
  uint64_t n_bytes() const;  ///< of all parts
  /// Throws Error where a part is no longer as it was opened.
  void require_unchanged() const;

 private:
  const Part& first() const { return *parts_.front(); }

  std::vector<std::unique_ptr<Part>> parts_;
  std::vector<Tensor> tensors_;  // of all parts
  std::unordered_map<std::string_view, size_t> tensor_index_;
};

}  // namespace qwen2vl::gguf
