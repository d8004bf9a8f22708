#include "base/aligned_buffer.h"

#include <limits>
#include <new>
#include <utility>

#ifdef _WIN32
#include <malloc.h>
#else
#include <sys/mman.h>

#include <cstdlib>
#endif

namespace qwen2vl {
namespace {

constexpr size_t kLine = 64;                   // a cache line and an AVX-512 vector
constexpr size_t kHugePage = size_t{2} << 20;  // the huge page of x86-64 and of aarch64 with 4 KiB pages

#ifdef _WIN32

void* allocate(size_t bytes) { return _aligned_malloc(bytes, bytes < kHugePage ? kLine : kHugePage); }
void release(void* data, size_t) { _aligned_free(data); }

#else

// Large buffers are mapped, not taken from the heap, so that freeing them gives the memory back at once.
void* map_aligned(size_t bytes) {
  const size_t reserved = bytes + kHugePage;
  void* raw = ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  auto* base = static_cast<uint8_t*>(raw);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(raw) % kHugePage) % kHugePage;
  if (head > 0) ::munmap(base, head);
  if (reserved > head + bytes) ::munmap(base + head + bytes, reserved - head - bytes);
#ifdef MADV_HUGEPAGE
  ::madvise(base + head, bytes, MADV_HUGEPAGE);  // advice: without huge pages the buffer works as well
#endif
  return base + head;
}

void* allocate(size_t bytes) {
  if (bytes >= kHugePage) return map_aligned(bytes);
  void* data = nullptr;
  return ::posix_memalign(&data, kLine, bytes) == 0 ? data : nullptr;
}

void release(void* data, size_t bytes) {
  if (bytes >= kHugePage) {
    ::munmap(data, bytes);
  } else {
    std::free(data);
  }
}

#endif

// What is mapped is a whole number of pages, of any page size up to 64 KiB.
size_t padded(size_t bytes) {
  const size_t unit = bytes < kHugePage ? kLine : size_t{1} << 16;
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  if (bytes > std::numeric_limits<size_t>::max() - 2 * kHugePage) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(allocate(padded(bytes)));
  if (data_ == nullptr) throw std::bad_alloc();
}

AlignedBuffer::~AlignedBuffer() {
  if (data_ != nullptr) release(data_, padded(size_));
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace qwen2vl
