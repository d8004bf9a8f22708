#pragma once

#include <cstddef>
#include <cstdint>

#include "base/aligned_buffer.h"

namespace qwen2vl::cpu {

/// At least `bytes` of a buffer that is never made smaller; growing loses what was in it.
inline uint8_t* grow(AlignedBuffer& buffer, size_t bytes) {
  if (buffer.size() < bytes) {
    buffer = AlignedBuffer();  // the old memory first: the two are never there together
    buffer = AlignedBuffer(bytes);
  }
  return buffer.data();
}

/// A grow-only float32 buffer.
class FloatBuffer {
 public:
  float* resize(int64_t elements) {
    grow(buffer_, static_cast<size_t>(elements) * sizeof(float));
    return data();
  }
  float* data() const { return buffer_.as<float>(); }
  void release() { buffer_ = AlignedBuffer(); }

 private:
  AlignedBuffer buffer_;
};

}  // namespace qwen2vl::cpu
