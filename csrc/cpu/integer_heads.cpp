#include "cpu/integer_heads.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace qwen2vl::cpu {
namespace {

// Rows that one task looks at before their channels are known: 28 tasks of a photo.
constexpr int64_t kChunkRows = 128;

int64_t chunks(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

}  // namespace

float largest_key(int64_t head_dim) {
  const double fits = std::numeric_limits<int32_t>::max() / static_cast<double>(head_dim);
  return static_cast<float>(std::min(32767.0, std::floor(std::sqrt(fits))));
}

template <typename Value>
IntegerHeads<Value>::IntegerHeads(FloatBuffer& buffer, const FullRows& x)
    : key_size_(panels(x.rows) * kPanelRows * x.head_dim),
      value_panel_(padded(x.rows, kValueRun) * kPanelRows),
      value_size_(panels(x.head_dim) * value_panel_) {
  const int64_t width = x.width(), ranges = chunks(x.rows) * 6 * width;
  const int64_t bytes = x.num_heads * (key_size_ * static_cast<int64_t>(sizeof(int16_t)) +
                                       value_size_ * static_cast<int64_t>(sizeof(Value)));
  float* at = buffer.resize(6 * width + ranges + (bytes + 3) / 4);
  for (float** field : {&channels_.key_center, &channels_.key_factor, &channels_.query_factor,
                        &channels_.value_center, &channels_.value_factor, &channels_.value_unit}) {
    *field = at;
    at += width;
  }
  ranges_ = at;
  keys_ = reinterpret_cast<int16_t*>(ranges_ + ranges);
  values_ = reinterpret_cast<Value*>(keys_ + x.num_heads * key_size_);
}

// All heads of a row before the next row: rows are long, and a head's share of one is a few cache lines.
template <typename Value>
void IntegerHeads<Value>::pack(Context& ctx, const FullRows& x) {
  ctx.pool.parallel_for(chunks(x.rows), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c) turn_and_note(ctx.kernels, x, c);
  });
  set_channels(x);
  ctx.pool.parallel_for(panels(x.rows), 4, [&](int64_t begin, int64_t end, int) {
    std::vector<int16_t> rounded(kPanelRows * padded(x.head_dim, kIntegerRoom));
    for (int64_t p = begin; p < end; ++p) pack_rows(ctx.kernels, x, p, rounded.data());
  });
}

template <typename Value>
void IntegerHeads<Value>::turn_and_note(const KernelTable& kernels, const FullRows& x, int64_t chunk) {
  const int64_t n = 2 * x.width(), first = chunk * kChunkRows, end = std::min(first + kChunkRows, x.rows);
  float *sum = ranges_ + chunk * 3 * n, *least = sum + n, *most = least + n;
  for (int64_t row = first; row < end; ++row) {
    for (int64_t h = 0; h < x.num_heads; ++h) x.rotate(kernels, x.key(row, h), row, x.key(row, h));
    const float* values = x.key(row, 0);  // and, behind the keys, the values
    if (row == first) {
      for (float* out : {sum, least, most}) std::memcpy(out, values, static_cast<size_t>(n) * sizeof(float));
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      sum[i] += values[i];
      least[i] = std::min(least[i], values[i]);
      most[i] = std::max(most[i], values[i]);
    }
  }
}

template <typename Value>
void IntegerHeads<Value>::set_channels(const FullRows& x) {
  const int64_t width = x.width(), n = 2 * width;
  const float exponent = 1.44269504f / std::sqrt(static_cast<float>(x.head_dim));
  for (int64_t i = 0; i < n; ++i) {
    const float* at = ranges_ + i;
    double total = 0;
    float least = at[n], most = at[2 * n];
    for (int64_t c = 0; c < chunks(x.rows); ++c, at += 3 * n) {
      total += at[0];
      least = std::min(least, at[n]);
      most = std::max(most, at[2 * n]);
    }
    const auto center = static_cast<float>(total / static_cast<double>(x.rows));
    // NaN where a value is not finite, and so will be the results.
    const float range = std::max(most - center, center - least) + 0 * center;
    const bool is_key = i < width;
    const float largest = is_key ? largest_key(x.head_dim) : static_cast<float>(kLargest);
    const float factor = range < 1e-30f ? 0.0f : largest / range, unit = range / largest;
    if (is_key) {
      channels_.key_center[i] = center;
      channels_.key_factor[i] = factor;
      channels_.query_factor[i] = unit * exponent;
    } else {
      channels_.value_center[i - width] = center;
      channels_.value_factor[i - width] = factor;
      channels_.value_unit[i - width] = unit;
    }
  }
}

/// rounded: [16][head_dim, padded]. What fills up the last panels is zero.
template <typename Value>
void IntegerHeads<Value>::pack_rows(const KernelTable& kernels, const FullRows& x, int64_t panel,
                                    int16_t* rounded) {
  const int64_t row = panel * kPanelRows, n = std::min(kPanelRows, x.rows - row);
  const int64_t room = padded(x.head_dim, kIntegerRoom);
  std::fill(rounded + n * room, rounded + kPanelRows * room, int16_t{0});
  for (int64_t h = 0; h < x.num_heads; ++h) {
    const int64_t channel = h * x.head_dim;
    for (int64_t r = 0; r < n; ++r)
      kernels.round_i16(x.key(row + r, h), channels_.key_center + channel, channels_.key_factor + channel,
                        x.head_dim, rounded + r * room);
    int16_t* key = keys(h) + row * x.head_dim;
    for (int64_t r = 0; r < kPanelRows; ++r)
      for (int64_t d = 0; d < x.head_dim; d += kKeyRun)
        std::memcpy(key + d * kPanelRows + r * kKeyRun, rounded + r * room + d, kKeyRun * sizeof(int16_t));

    for (int64_t r = 0; r < n; ++r)
      kernels.round_i16(x.value(row + r, h), channels_.value_center + channel,
                        channels_.value_factor + channel, x.head_dim, rounded + r * room);
    Value* value = values(h) + row * kPanelRows;
    for (int64_t d = 0; d < x.head_dim; d += kPanelRows, value += value_panel_)
      for (int64_t r = 0; r < n; r += kValueRun)
        for (int64_t i = 0; i < kPanelRows; ++i)
          for (int64_t j = 0; j < kValueRun; ++j)
            value[r * kPanelRows + i * kValueRun + j] = static_cast<Value>(rounded[(r + j) * room + d + i]);
  }
}

template class IntegerHeads<int8_t>;
template class IntegerHeads<int16_t>;

}  // namespace qwen2vl::cpu
