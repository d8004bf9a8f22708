#pragma once

#include <cstddef>
#include <cstdint>

namespace qwen2vl {

/// Uninitialized memory aligned to 64 bytes (a cache line and an AVX-512 vector), or to 2 MiB with huge
/// pages advised where it is that large. Throws std::bad_alloc. Movable.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace qwen2vl
