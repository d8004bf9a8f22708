#pragma once

#include <cstddef>
#include <cstdint>

#include "base/aligned_buffer.h"

namespace qwen2vl::cpu {

/// A grow-only float32 buffer.
class FloatBuffer {
 public:
  float* resize(int64_t elements) {
    const size_t bytes = static_cast<size_t>(elements) * sizeof(float);
    if (buffer_.size() < bytes) {
      buffer_ = AlignedBuffer();
      buffer_ = AlignedBuffer(bytes);
    }
    return data();
  }
  float* data() const { return buffer_.as<float>(); }
  void release() { buffer_ = AlignedBuffer(); }

 private:
  AlignedBuffer buffer_;
};

}  // namespace qwen2vl::cpu
