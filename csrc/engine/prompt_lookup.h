#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace qwen2vl {

/// What may come after `tokens`: what came after their last three, or else two, where these stood before, the
/// latest place first. `most` tokens, and on from the beginning of that stretch where it is shorter; none
/// where the last two are new (prompt lookup decoding: github.com/apoorvumang/prompt-lookup-decoding).
inline std::vector<int32_t> look_up(std::span<const int32_t> tokens, int64_t most) {
  std::vector<int32_t> guess;
  for (const size_t n : {3, 2}) {
    if (tokens.size() <= n) continue;
    const auto known = tokens.last(n), earlier = tokens.first(tokens.size() - 1);
    const auto found = std::find_end(earlier.begin(), earlier.end(), known.begin(), known.end());
    if (found == earlier.end()) continue;
    const auto after = tokens.subspan(static_cast<size_t>(found - earlier.begin()) + n);
    for (int64_t i = 0; i < most; ++i) guess.push_back(after[static_cast<size_t>(i) % after.size()]);
    break;
  }
  return guess;
}

}  // namespace qwen2vl
