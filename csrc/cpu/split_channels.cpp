#include "cpu/split_channels.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace qwen2vl::cpu {
namespace {

// bf16 rounds it by up to 1/16: with a query of 1 and head_dim 128, a score by half a percent.
constexpr float kLargeBias = 16;

}  // namespace

SplitChannels::SplitChannels(const TextConfig& config, const TextWeights& weights) {
  const int64_t half = config.head_dim / 2, heads = config.num_key_value_heads;
  for (const DecoderLayerWeights& layer : weights.layers) {
    Layer& split = layers_.emplace_back();
    const Vector& bias = layer.k_proj.bias;
    if (bias.empty()) continue;
    // The halves of a pair turn into one another.
    const auto size = [&](int64_t head, int64_t pair) {
      const float* b = bias.data() + head * config.head_dim + pair;
      return std::hypot(b[0], b[half]);
    };
    for (int64_t head = 0; head < heads; ++head) {
      int64_t large = 0;
      for (int64_t pair = 0; pair < half; ++pair) large += size(head, pair) > kLargeBias;
      split.count = std::max(split.count, std::min({2 * large, kMost, 2 * half}));
    }
    std::vector<int32_t> pairs(half);
    for (int64_t head = 0; head < heads; ++head) {
      std::iota(pairs.begin(), pairs.end(), 0);
      std::stable_sort(pairs.begin(), pairs.end(),
                       [&](int32_t a, int32_t b) { return size(head, a) > size(head, b); });
      for (int64_t i = 0; i < split.count / 2; ++i)
        split.dims.insert(split.dims.end(), {pairs[i], static_cast<int32_t>(pairs[i] + half)});
    }
  }
}

}  // namespace qwen2vl::cpu
