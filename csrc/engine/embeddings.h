#pragma once

#include <cstdint>

#include "base/aligned_buffer.h"

namespace qwen2vl {

/// The rows of an image or video, which stand in for the embeddings of its pad tokens: [rows][hidden_size].
class Embeddings {
 public:
  Embeddings(int64_t rows, int64_t hidden_size)
      : rows_(rows), hidden_size_(hidden_size), values_(static_cast<size_t>(bytes())) {}

  int64_t rows() const { return rows_; }
  int64_t hidden_size() const { return hidden_size_; }
  int64_t bytes() const { return rows_ * hidden_size_ * static_cast<int64_t>(sizeof(float)); }
  float* data() { return values_.as<float>(); }
  const float* row(int64_t i) const { return values_.as<float>() + i * hidden_size_; }

 private:
  int64_t rows_, hidden_size_;
  AlignedBuffer values_;
};

}  // namespace qwen2vl
