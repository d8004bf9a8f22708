#include "cpu/outliers.h"

#include <algorithm>
#include <cmath>

namespace qwen2vl::cpu {
namespace {

constexpr int64_t kFewRows = 16;
constexpr int64_t kColumnsPerTask = 256;

/// maxima[c] = max |x[r][c]| over the rows.
void column_maxima(const float* x, int64_t rows, int64_t cols, int64_t x_stride, float* maxima) {
  std::fill_n(maxima, cols, 0.0f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) maxima[c] = std::max(maxima[c], std::fabs(x[r * x_stride + c]));
}

}  // namespace

std::vector<int32_t> find_outliers(Context& ctx, const float* x, int64_t rows, int64_t cols,
                                   int64_t x_stride) {
  std::vector<float> maxima(cols);
  float* out = maxima.data();
  if (rows < kFewRows)
    column_maxima(x, rows, cols, x_stride, out);
  else
    ctx.pool.parallel_for(cols, kColumnsPerTask, [&](int64_t begin, int64_t end, int) {
      column_maxima(x + begin, rows, end - begin, x_stride, out + begin);
    });

  // The mean of the columns below the limit, the limit from the mean: outliers leave the mean after a step or
  // two.
  float limit = INFINITY;
  for (int step = 0; step < 3; ++step) {
    double sum = 0;
    int64_t n = 0;
    for (int64_t c = 0; c < cols; ++c) {
      const bool counts = out[c] <= limit;
      sum += counts ? out[c] : 0;
      n += counts;
    }
    if (n == 0) return {};
    limit = kOutlierRatio * static_cast<float>(sum / static_cast<double>(n));
  }
  std::vector<int32_t> columns;
  if (!std::isfinite(limit) || limit == 0) return columns;
  for (int64_t c = 0; c < cols; ++c)
    if (out[c] > limit) columns.push_back(static_cast<int32_t>(c));
  const size_t most = static_cast<size_t>(rows < kFewRows ? 8 : cols / 32);
  if (columns.size() > most) {
    std::nth_element(columns.begin(), columns.begin() + most, columns.end(),
                     [&](int32_t a, int32_t b) { return out[a] > out[b]; });
    columns.resize(most);
    std::sort(columns.begin(), columns.end());
  }
  return columns;
}

}  // namespace qwen2vl::cpu
