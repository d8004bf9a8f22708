#include "cpu/outliers.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

namespace qwen2vl::cpu {

float outlier_limit(const KernelTable& kernels, const float* row, int64_t cols, float* maxima) {
  constexpr float kNone = std::numeric_limits<float>::infinity();
  const float largest = kernels.block_maxima(row, cols, maxima);
  float limit = kNone;
  for (int step = 0; step < kLimitSteps; ++step) {
    limit = kOutlierRatio * kernels.sum_capped(row, limit, cols) / static_cast<float>(cols);
    if (!(largest > limit)) return kNone;  // the limit only sinks where something lies above it
  }
  return std::isfinite(limit) ? limit : kNone;
}

void take_outliers(float* row, int64_t cols, const float* maxima, float limit, int64_t index,
                   std::vector<Outlier>& found) {
  const size_t first = found.size();
  for (int64_t block = 0; block < cols / kBlock32; ++block) {
    if (!(maxima[block] > limit)) continue;
    for (int64_t c = block * kBlock32; c < (block + 1) * kBlock32; ++c)
      if (std::fabs(row[c]) > limit) found.push_back({index, static_cast<int32_t>(c), row[c]});
  }
  const size_t most = static_cast<size_t>(std::max(kFewOutliers, cols / kMostOutliersIn));
  if (found.size() - first > most) {
    const auto begin = found.begin() + static_cast<std::ptrdiff_t>(first);
    std::stable_sort(begin, found.end(), [](const Outlier& a, const Outlier& b) {
      return std::fabs(a.value) > std::fabs(b.value);
    });
    found.resize(first + most);
  }
  for (size_t i = first; i < found.size(); ++i) row[found[i].column] = 0;
}

std::vector<int32_t> outlier_columns(std::span<const float> norm_weights) {
  const size_t cols = norm_weights.size(), most = cols / size_t{kMostOutliersIn};
  const auto size = [&](size_t c) { return std::fabs(norm_weights[c]); };
  float limit = std::numeric_limits<float>::infinity();
  for (int step = 0; step < kLimitSteps; ++step) {
    double sum = 0;
    for (size_t c = 0; c < cols; ++c) sum += std::min(size(c), limit);
    limit = kNormRatio * static_cast<float>(sum / static_cast<double>(cols));
  }
  std::vector<int32_t> columns;
  for (size_t c = 0; c < cols; ++c)
    if (size(c) > limit) columns.push_back(static_cast<int32_t>(c));
  if (columns.size() > most) {
    std::stable_sort(columns.begin(), columns.end(), [&](int32_t a, int32_t b) { return size(a) > size(b); });
    columns.resize(most);
  }
  return columns;
}

void take_columns(float* row, std::span<const int32_t> columns, int64_t index, std::vector<Outlier>& found) {
  for (const int32_t c : columns) {
    found.push_back({index, c, row[c]});
    row[c] = 0;
  }
}

OutlierMatrix gather_outliers(std::span<const std::vector<Outlier>> found, int64_t rows, FloatBuffer& room) {
  OutlierMatrix matrix;
  std::vector<int32_t>& columns = matrix.columns;
  for (const auto& some : found)
    for (const Outlier& o : some) columns.push_back(o.column);
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
  const int64_t n = static_cast<int64_t>(columns.size());
  if (n == 0) return matrix;
  float* values = room.resize(rows * n);
  std::fill_n(values, rows * n, 0.0f);
  for (const auto& some : found)
    for (const Outlier& o : some)
      values[o.row * n + (std::lower_bound(columns.begin(), columns.end(), o.column) - columns.begin())] =
          o.value;
  matrix.values = values;
  return matrix;
}

}  // namespace qwen2vl::cpu
