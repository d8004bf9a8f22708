#include "cpu/outliers.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <mutex>

namespace qwen2vl::cpu {
namespace {

constexpr int64_t kFewRows = 16;
constexpr int64_t kColumnsPerTask = 256;

}  // namespace

std::vector<int32_t> find_outliers(Context& ctx, const float* x, int64_t rows, int64_t cols, int64_t x_stride,
                                   const float* known_maxima) {
  std::vector<float> maxima(known_maxima != nullptr ? 0 : cols);
  const float* out = known_maxima != nullptr ? known_maxima : maxima.data();
  float largest = 0;
  if (known_maxima != nullptr) {
    largest = *std::max_element(known_maxima, known_maxima + cols);
  } else if (rows < kFewRows) {
    largest = ctx.kernels.column_maxima(x, x_stride, rows, cols, maxima.data());
  } else {
    std::mutex mutex;
    ctx.pool.parallel_for(cols, kColumnsPerTask, [&](int64_t begin, int64_t end, int) {
      const float here =
          ctx.kernels.column_maxima(x + begin, x_stride, rows, end - begin, maxima.data() + begin);
      const std::lock_guard lock(mutex);
      largest = std::max(largest, here);
    });
  }

  // The mean of the maxima capped at the limit, the limit from the mean: outliers hardly count after a few
  // steps.
  float limit = std::numeric_limits<float>::infinity();
  for (int step = 0; step < 4 && largest > 0; ++step) {
    limit = kOutlierRatio * ctx.kernels.sum_capped(out, limit, cols) / static_cast<float>(cols);
    if (!(largest > limit)) return {};  // the limit only sinks where something lies above it
  }
  std::vector<int32_t> columns;
  if (!std::isfinite(limit)) return columns;
  for (int64_t c = 0; c < cols; ++c)
    if (out[c] > limit) columns.push_back(static_cast<int32_t>(c));
  const size_t most = static_cast<size_t>(rows < kFewRows ? 8 : cols / 32);
  if (columns.size() > most) {
    const auto end = columns.begin() + static_cast<std::ptrdiff_t>(most);
    std::nth_element(columns.begin(), end, columns.end(),
                     [&](int32_t a, int32_t b) { return out[a] > out[b]; });
    columns.resize(most);
    std::sort(columns.begin(), columns.end());
  }
  return columns;
}

}  // namespace qwen2vl::cpu
