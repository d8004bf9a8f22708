#pragma once

#include "cpu/full_tile.h"

namespace qwen2vl::cpu {

inline int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// The largest integers of 16 bits that queries and keys become, such that head_dim products fit 32 bits.
float largest_key(int64_t head_dim);

/// Every channel of keys and values has a center, which in keys changes no softmax and in values is added to
/// the results, and a scale of its own, which queries and results take over. All [width].
struct Channels {
  float *key_center, *key_factor;      ///< integer = (key - center) * factor
  float* query_factor;                 ///< log2(e) / sqrt(head_dim) / key_factor
  float *value_center, *value_factor;  ///< integer = (value - center) * factor
  float* value_unit;                   ///< 1 / value_factor
};

/// Keys of all heads in panels as 16-bit integers, values as integers of 16 bits or of 8 (see
/// KernelTable::gemm_i16). Packing turns the rows' keys in place.
template <typename Value>
class IntegerHeads {
 public:
  static constexpr int64_t kKeyRun = 2, kValueRun = 4 / static_cast<int64_t>(sizeof(Value));
  static constexpr int32_t kLargest = sizeof(Value) == 1 ? 127 : kLargest16;

  IntegerHeads(FloatBuffer& buffer, const FullRows& x);
  void pack(Context& ctx, const FullRows& x);

  const Channels& channels() const { return channels_; }
  /// [ceil(rows / 16)] panels of head_dim x 16 keys.
  int16_t* keys(int64_t h) const { return keys_ + h * key_size_; }
  /// [ceil(head_dim / 16)] panels of (rows, padded to runs) x 16 dims.
  Value* values(int64_t h) const { return values_ + h * value_size_; }
  int64_t value_panel() const { return value_panel_; }

 private:
  void turn_and_note(const KernelTable& kernels, const FullRows& x, int64_t chunk);
  void set_channels(const FullRows& x);
  void pack_rows(const KernelTable& kernels, const FullRows& x, int64_t panel, int16_t* rounded);

  int64_t key_size_, value_panel_, value_size_;
  Channels channels_;
  float* ranges_;  ///< [chunks of rows][sum, least, most][2 width]: of every channel of keys and of values
  int16_t* keys_;
  Value* values_;
};

}  // namespace qwen2vl::cpu
