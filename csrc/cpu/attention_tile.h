#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/panel_matrix.h"

namespace qwen2vl::cpu {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline int64_t panels(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }

/// Queries of a tile and their running result. Lives in a thread's scratch.
struct Tile {
  float* queries = nullptr;  ///< [rows][key_dims]
  float* scores = nullptr;   ///< [rows][keys]
  float* output = nullptr;   ///< [rows][head_dim]
  float* maximum = nullptr;  ///< [rows]
  float* sum = nullptr;      ///< [rows]
  float* factors = nullptr;  ///< [rows], by which a step of the softmax shrinks what was before it

  static size_t bytes(int64_t rows, int64_t keys, int64_t head_dim, int64_t key_dims) {
    return static_cast<size_t>(rows) * (keys + head_dim + key_dims + 3) * sizeof(float);
  }
  Tile(std::byte* scratch, int64_t rows, int64_t keys, int64_t head_dim, int64_t key_dims) {
    scores = reinterpret_cast<float*>(scratch);
    output = scores + rows * keys;
    queries = output + rows * head_dim;
    maximum = queries + rows * key_dims;
    sum = maximum + rows;
    factors = sum + rows;
  }
  void start(int64_t rows, int64_t head_dim) {
    std::memset(output, 0, static_cast<size_t>(rows * head_dim) * sizeof(float));
    std::fill_n(maximum, rows, kMinusInfinity);
    std::fill_n(sum, rows, 0.0f);
  }
};

}  // namespace qwen2vl::cpu
