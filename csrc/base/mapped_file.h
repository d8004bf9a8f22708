#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace qwen2vl {

/// A regular file mapped read-only into memory (mmap, or MapViewOfFile on Windows). Throws Error, naming
/// the path and the system's reason, where it cannot be opened or mapped.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const uint8_t> bytes() const { return {data_, size_}; }

  /// Throws Error where the file is no longer as it was opened: what is read of one that has been cut short
  /// ends the process.
  void require_unchanged() const;

  /// Gives the resident pages of [offset, offset + length) back to the system; a later read maps them in
  /// again. Advice only: a system without it does nothing.
  void release(size_t offset, size_t length) const;

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
  std::string path_;
#ifdef _WIN32
  void* file_ = nullptr;
  void* mapping_ = nullptr;
#else
  int file_ = -1;
  int64_t modified_ns_ = 0;
#endif
};

}  // namespace qwen2vl
