#include "base/mapped_file.h"

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

[[noreturn]] void fail(const std::string& path, const std::string& action, int code) {
  throw IoError(path, action, code);
}

}  // namespace

#ifdef _WIN32

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int length = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path.c_str(), -1, nullptr, 0);
  if (length == 0) fail(path, "read the path as UTF-8", static_cast<int>(GetLastError()));
  std::wstring wide(static_cast<size_t>(length), L'\0');
  MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path.c_str(), -1, wide.data(), length);

  file_ = CreateFileW(wide.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING,
                      FILE_ATTRIBUTE_NORMAL, nullptr);
  if (file_ == INVALID_HANDLE_VALUE) fail(path, "open", static_cast<int>(GetLastError()));
  const auto close_and_fail = [&](const char* action) {
    const int code = static_cast<int>(GetLastError());
    if (mapping_ != nullptr) CloseHandle(mapping_);
    CloseHandle(file_);
    fail(path, action, code);
  };
  LARGE_INTEGER size;
  if (!GetFileSizeEx(file_, &size)) close_and_fail("find the size");
  size_ = static_cast<size_t>(size.QuadPart);
  if (size_ == 0) return;  // an empty file cannot be mapped
  mapping_ = CreateFileMappingW(file_, nullptr, PAGE_READONLY, 0, 0, nullptr);
  if (mapping_ == nullptr) close_and_fail("map");
  data_ = static_cast<const uint8_t*>(MapViewOfFile(mapping_, FILE_MAP_READ, 0, 0, 0));
  if (data_ == nullptr) close_and_fail("map");
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) UnmapViewOfFile(data_);
  if (mapping_ != nullptr) CloseHandle(mapping_);
  CloseHandle(file_);
}

void MappedFile::require_unchanged() const {}  // the system lets nobody write to what we have open

void MappedFile::release(size_t offset, size_t length) const {
  if (offset >= size_) return;
  // Unlocking pages that are not locked takes them out of the working set.
  VirtualUnlock(const_cast<uint8_t*>(data_) + offset, std::min(length, size_ - offset));
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

MappedFile::MappedFile(const std::string& path) : path_(path) {
  // Without O_NONBLOCK the open of a named pipe would wait for its writer.
  file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file_ < 0) fail(path, "open", errno);
  const auto close_and_fail = [&](const char* action, int code) {
    ::close(file_);
    fail(path, action, code);
  };
  struct stat info;
  if (::fstat(file_, &info) != 0) close_and_fail("read", errno);
  if (S_ISDIR(info.st_mode)) close_and_fail("read", EISDIR);
  if (!S_ISREG(info.st_mode)) {
    ::close(file_);
    throw Error(path + ": not a regular file");
  }
  if (static_cast<uint64_t>(info.st_size) > std::numeric_limits<size_t>::max()) close_and_fail("map", EFBIG);
  size_ = static_cast<size_t>(info.st_size);
  modified_ns_ = modified_ns(info);
  if (size_ == 0) return;  // an empty file cannot be mapped
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file_, 0);
  if (data == MAP_FAILED) close_and_fail("map", errno);
  data_ = static_cast<const uint8_t*>(data);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), size_);
  ::close(file_);
}

void MappedFile::require_unchanged() const {
  struct stat info;
  if (::fstat(file_, &info) != 0) fail(path_, "read", errno);
  if (static_cast<uint64_t>(info.st_size) != size_ || modified_ns(info) != modified_ns_)
    throw Error(path_ + ": the file has been changed since it was opened");
}

void MappedFile::release(size_t offset, size_t length) const {
  if (offset >= size_) return;
  // Whole pages only: a page at the edge may hold a neighbour that is still in use.
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t begin = (offset + page - 1) / page * page;
  const size_t end = (offset + std::min(length, size_ - offset)) / page * page;
  if (begin < end) ::madvise(const_cast<uint8_t*>(data_) + begin, end - begin, MADV_DONTNEED);
}

#endif

}  // namespace qwen2vl
