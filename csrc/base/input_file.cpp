#include "base/input_file.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

#ifdef _WIN32
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace qwen2vl {
namespace {

// Of one system call: some take no more than 2^31 - 1 bytes.
constexpr size_t kMostBytes = size_t{1} << 30;

size_t mappable(const std::string& name, uint64_t size) {
  if (size > std::numeric_limits<size_t>::max())
    throw Error(name + ": cannot map: it is larger than the address space");
  return static_cast<size_t>(size);
}

}  // namespace

void InputFile::fail_changed() const {
  throw Error(name_ + ": the file has been changed since it was opened");
}

#ifdef _WIN32

InputFile::InputFile(const std::filesystem::path& path) : path_(path), name_(printable_path(path)) {
  file_ = CreateFileW(path.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING,
                      FILE_ATTRIBUTE_NORMAL, nullptr);
  if (file_ == INVALID_HANDLE_VALUE) throw IoError(path_, "open", static_cast<int>(GetLastError()));
  LARGE_INTEGER size;
  if (!GetFileSizeEx(file_, &size)) {
    const int code = static_cast<int>(GetLastError());
    CloseHandle(file_);
    throw IoError(path_, "find the size", code);
  }
  size_ = static_cast<uint64_t>(size.QuadPart);
}

InputFile::~InputFile() { CloseHandle(file_); }

void InputFile::read(uint64_t offset, std::span<uint8_t> out) const {
  while (!out.empty()) {
    OVERLAPPED place{};
    place.Offset = static_cast<DWORD>(offset);
    place.OffsetHigh = static_cast<DWORD>(offset >> 32);
    DWORD n = 0;
    const bool read =
        ReadFile(file_, out.data(), static_cast<DWORD>(std::min(out.size(), kMostBytes)), &n, &place);
    if (!read && GetLastError() != ERROR_HANDLE_EOF)
      throw IoError(path_, "read", static_cast<int>(GetLastError()));
    if (n == 0) fail_changed();
    out = out.subspan(n);
    offset += n;
  }
}

void InputFile::require_unchanged() const {}  // the system lets nobody write to what we have open

MappedFile::MappedFile(const InputFile& file) : size_(mappable(file.name(), file.size())) {
  if (size_ == 0) return;  // an empty file cannot be mapped
  const HANDLE mapping = CreateFileMappingW(file.file_, nullptr, PAGE_READONLY, 0, 0, nullptr);
  if (mapping != nullptr) data_ = static_cast<const uint8_t*>(MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0));
  const int code = static_cast<int>(GetLastError());
  if (mapping != nullptr) CloseHandle(mapping);  // the view keeps it
  if (data_ == nullptr) throw IoError(file.path_, "map", code);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) UnmapViewOfFile(data_);
}

void MappedFile::release() const {
  // Unlocking pages that are not locked takes them out of the working set.
  if (data_ != nullptr) VirtualUnlock(const_cast<uint8_t*>(data_), size_);
}

#else

namespace {

int64_t modified_ns(const struct stat& info) {
#ifdef __APPLE__
  const struct timespec& time = info.st_mtimespec;
#else
  const struct timespec& time = info.st_mtim;
#endif
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

InputFile::InputFile(const std::filesystem::path& path) : path_(path), name_(printable_path(path)) {
  // Without O_NONBLOCK the open of a named pipe would wait for its writer.
  file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file_ < 0) throw IoError(path_, "open", errno);
  const auto close_and_fail = [&](int code) {
    ::close(file_);
    throw IoError(path_, "read", code);
  };
  struct stat info;
  if (::fstat(file_, &info) != 0) close_and_fail(errno);
  if (S_ISDIR(info.st_mode)) close_and_fail(EISDIR);
  if (!S_ISREG(info.st_mode)) {
    ::close(file_);
    throw Error(name_ + ": not a regular file");
  }
  size_ = static_cast<uint64_t>(info.st_size);
  modified_ns_ = modified_ns(info);
}

InputFile::~InputFile() { ::close(file_); }

void InputFile::read(uint64_t offset, std::span<uint8_t> out) const {
  while (!out.empty()) {
    const ssize_t n =
        ::pread(file_, out.data(), std::min(out.size(), kMostBytes), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw IoError(path_, "read", errno);
    if (n == 0) fail_changed();
    out = out.subspan(static_cast<size_t>(n));
    offset += static_cast<uint64_t>(n);
  }
}

void InputFile::require_unchanged() const {
  struct stat info;
  if (::fstat(file_, &info) != 0) throw IoError(path_, "read", errno);
  if (static_cast<uint64_t>(info.st_size) != size_ || modified_ns(info) != modified_ns_) fail_changed();
}

MappedFile::MappedFile(const InputFile& file) : size_(mappable(file.name(), file.size())) {
  if (size_ == 0) return;  // an empty file cannot be mapped
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.file_, 0);
  if (data == MAP_FAILED) throw IoError(file.path_, "map", errno);
  data_ = static_cast<const uint8_t*>(data);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), size_);
}

void MappedFile::release() const {
  if (data_ != nullptr) ::madvise(const_cast<uint8_t*>(data_), size_, MADV_DONTNEED);
}

#endif

}  // namespace qwen2vl
