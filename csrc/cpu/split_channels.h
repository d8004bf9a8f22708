#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/config.h"
#include "model/weights.h"

namespace qwen2vl::cpu {

/// Channels of keys with so large a bias that its rounding to 16 bits drowns what the others say: in Qwen2
/// hundreds, in a few slow-turning channels of the first and the last layer. The cache holds them in two
/// parts: where the others stand, rounded, and in a row of their own what rounding left.
class SplitChannels {
 public:
  /// Of a head: at head_dim 128, keys then take a sixteenth more.
  static constexpr int64_t kMost = 8;

  SplitChannels() = default;  ///< none
  SplitChannels(const TextConfig& config, const TextWeights& weights);

  /// Of each key-value head of a layer: an even number.
  int64_t count(int64_t layer) const { return layers_.empty() ? 0 : layers_[layer].count; }
  /// The dimensions [count(layer)] of one head.
  std::span<const int32_t> of(int64_t layer, int64_t head) const {
    if (layers_.empty()) return {};
    return std::span(layers_[layer].dims).subspan(head * layers_[layer].count, layers_[layer].count);
  }

 private:
  struct Layer {
    int64_t count = 0;
    std::vector<int32_t> dims;  ///< [head][count]
  };
  std::vector<Layer> layers_;
};

}  // namespace qwen2vl::cpu
