#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace qwen2vl {

/// A regular file, open for reading. Throws IoError where it cannot be opened or read.
class InputFile {
 public:
  explicit InputFile(const std::filesystem::path& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::string& name() const { return name_; }  ///< the path, as messages show it
  uint64_t size() const { return size_; }            ///< when it was opened

  /// Fills `out` from `offset` on; threads may read at once. Throws Error where the file has been cut short.
  void read(uint64_t offset, std::span<uint8_t> out) const;

  /// Throws Error where the file is no longer as it was opened.
  void require_unchanged() const;

 private:
  friend class MappedFile;
  [[noreturn]] void fail_changed() const;

  std::filesystem::path path_;
  std::string name_;
  uint64_t size_ = 0;
#ifdef _WIN32
  void* file_ = nullptr;
#else
  int file_ = -1;
  int64_t modified_ns_ = 0;
#endif
};

/// A file mapped read-only into memory (mmap, or MapViewOfFile on Windows), while it is open or longer.
/// Throws IoError where it cannot be. Whoever reads bytes of a file that has been cut short since ends the
/// process: InputFile::read is for those who can copy.
class MappedFile {
 public:
  explicit MappedFile(const InputFile& file);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const uint8_t> bytes() const { return {data_, size_}; }

  /// Gives the resident pages back to the system; a later read maps them in again. Advice only: a system
  /// without it does nothing.
  void release() const;

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace qwen2vl
