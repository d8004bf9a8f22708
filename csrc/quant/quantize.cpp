#include "quant/quantize.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "base/half.h"
#include "quant/formats.h"
#include "quant/quantize_blocks.h"

namespace qwen2vl {
namespace {

constexpr float kLeastWeight = 1e-5f;  // of a mean of 1: far below what any column in use has
constexpr int32_t kSignBit = INT32_MIN;
constexpr int32_t kInfinity = 0x7f800000;  // bits; larger magnitudes are NaN

int32_t bits(float value) { return std::bit_cast<int32_t>(value); }

/// The bits of the largest |x[i]|: magnitudes order as integers do, and the compiler vectorizes those.
template <int64_t kCount>
int32_t max_magnitude(const float* x) {
  int32_t largest = 0;
  for (int64_t i = 0; i < kCount; ++i) largest = std::max(largest, bits(x[i]) & ~kSignBit);
  return largest;
}

/// Of the values with the largest magnitude the first, with its sign.
float first_extreme(const float* x, int32_t magnitude) {
  int32_t positive = kSignBit, negative = kSignBit;  // largest of each sign; the other sign's are below 0
  for (int64_t i = 0; i < kBlock32; ++i) {
    positive = std::max(positive, bits(x[i]));
    negative = std::max(negative, bits(x[i]) ^ kSignBit);
  }
  if (positive < negative) return -std::bit_cast<float>(magnitude);
  if (positive > negative) return std::bit_cast<float>(magnitude);
  return *std::find_if(x, x + kBlock32, [&](float v) { return (bits(v) & ~kSignBit) == magnitude; });
}

/// 1 / d, and 0 for d = 0. A d so small that 1 / d overflows is 0 as float16, so that the block is zeros
/// whatever its q; they are written as 0, as gguf does.
float inverse(float d) {
  const float id = d == 0 ? 0 : 1 / d;
  return std::isinf(id) ? 0 : id;
}

void round_block(const float* x, int32_t magnitude, Block<DType::Q4_0>* out) {
  const float d = first_extreme(x, magnitude) / -8;
  const float id = inverse(d);
  out->d = f32_to_f16(d);
  if (id == 0 && d != 0) {
    std::memset(out->qs, 0, sizeof out->qs);
    return;
  }
  constexpr int64_t kHalf = kBlock32 / 2;
  for (int64_t i = 0; i < kHalf; ++i) {
    const int low = std::min(15, static_cast<int>(x[i] * id + 8.5f));
    const int high = std::min(15, static_cast<int>(x[i + kHalf] * id + 8.5f));
    out->qs[i] = static_cast<uint8_t>(low | high << 4);
  }
}

void round_block(const float* x, int32_t magnitude, Block<DType::Q8_0>* out) {
  const float d = std::bit_cast<float>(magnitude) / 127;
  const float id = inverse(d);
  out->d = f32_to_f16(d);
  for (int64_t i = 0; i < kBlock32; ++i) {  // rounds halves away from zero
    const float scaled = x[i] * id;
    const float size = std::fabs(scaled);
    const int whole = static_cast<int>(size);
    const int rounded = whole + (size - static_cast<float>(whole) >= 0.5f ? 1 : 0);
    out->qs[i] = static_cast<int8_t>(scaled < 0 ? -rounded : rounded);
  }
}

[[noreturn]] void refuse_not_finite(DType type, const float* begin, const float* block, int64_t cols) {
  const float* value = std::find_if_not(block, block + cols, [](float v) { return std::isfinite(v); });
  throw std::invalid_argument(std::string(dtype_traits(type).name) + " holds finite values only; column " +
                              std::to_string((value - begin) % cols) + " of a row is " +
                              std::to_string(*value));
}

/// The rows as one sequence of blocks, and the weights of each.
template <DType T>
class Blocks {
 public:
  static constexpr int64_t kElements = traits_of(T).block_elements;

  Blocks(const float* values, int64_t rows, int64_t cols, const float* weights)
      : values_(values), n_(rows * cols / kElements), cols_(cols), weights_(weights) {}

  int64_t size() const { return n_; }

  /// Finite values.
  const float* x(int64_t i) const {
    const float* x = values_ + i * kElements;
    if (magnitude(x) >= kInfinity) refuse_not_finite(T, values_, x, cols_);
    return x;
  }

  static int32_t magnitude(const float* x) { return max_magnitude<kElements>(x); }

  const float* w(int64_t i) const {
    static constexpr auto kEqual = [] {
      std::array<float, kElements> ones;
      ones.fill(1);
      return ones;
    }();
    return weights_ == nullptr ? kEqual.data() : weights_ + i * kElements % cols_;
  }

 private:
  const float* values_;
  int64_t n_, cols_;
  const float* weights_;
};

template <DType T>
void round_blocks(const Blocks<T>& blocks, uint8_t* out) {
  for (int64_t i = 0; i < blocks.size(); ++i, out += sizeof(Block<T>)) {
    const float* x = blocks.x(i);
    Block<T> block;  // `out` need not be aligned
    round_block(x, blocks.magnitude(x), &block);
    std::memcpy(out, &block, sizeof block);
  }
}

template <DType T>
void search_blocks(const Blocks<T>& blocks, uint8_t* out) {
  if constexpr (Blocks<T>::kElements == kBlock32) {
    for (int64_t begin = 0; begin < blocks.size(); begin += kGroup) {
      BlockGroup group;
      for (int k = 0; k < kGroup; ++k) {
        const int64_t i = std::min(begin + k, blocks.size() - 1);
        group.x[k] = blocks.x(i);
        group.w[k] = blocks.w(i);
      }
      Block<T> found[kGroup];
      quantize_blocks(group, found);
      const int64_t n = std::min<int64_t>(kGroup, blocks.size() - begin);
      std::memcpy(out + begin * sizeof(Block<T>), found, n * sizeof(Block<T>));
    }
  } else {
    for (int64_t i = 0; i < blocks.size(); ++i) {
      Block<T> block;
      quantize_block(blocks.x(i), blocks.w(i), &block);
      std::memcpy(out + i * sizeof block, &block, sizeof block);
    }
  }
}

void convert(uint16_t (*narrow)(float), const float* values, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t half = narrow(values[i]);
    std::memcpy(out + i * 2, &half, sizeof half);
  }
}

}  // namespace

void quantize_rows(DType type, const float* values, int64_t rows, int64_t cols, uint8_t* out,
                   const float* weights) {
  const int64_t bytes = rows * row_bytes(type, cols);
  visit_dtype(type, [&]<DType T>() {
    if constexpr (!traits_of(T).is_written)
      refuse_dtype(T, ("one that is written: " + written_dtype_names()).c_str());
    else if constexpr (T == DType::F32)
      std::memcpy(out, values, static_cast<size_t>(bytes));
    else if constexpr (T == DType::F16)
      convert(f32_to_f16, values, rows * cols, out);
    else if constexpr (T == DType::BF16)
      convert(f32_to_bf16, values, rows * cols, out);
    else if constexpr (T == DType::Q8_0)
      round_blocks(Blocks<T>(values, rows, cols, weights), out);
    else if (T == DType::Q4_0 && weights == nullptr)
      round_blocks(Blocks<DType::Q4_0>(values, rows, cols, weights), out);
    else
      search_blocks(Blocks<T>(values, rows, cols, weights), out);
  });
}

std::vector<float> search_weights(const float* importance, int64_t cols) {
  double sum = 0;
  for (int64_t i = 0; i < cols; ++i) {
    if (!(importance[i] >= 0 && importance[i] <= std::numeric_limits<float>::max())) {
      throw std::invalid_argument("weights: expected finite numbers of 0 or more; that of column " +
                                  std::to_string(i) + " is " + std::to_string(importance[i]));
    }
    sum += importance[i];
  }
  std::vector<float> weights(static_cast<size_t>(cols), 1.0f);
  if (sum == 0) return weights;
  const double per_mean = static_cast<double>(cols) / sum;
  for (int64_t i = 0; i < cols; ++i)
    weights[i] = std::max(kLeastWeight, static_cast<float>(importance[i] * per_mean));
  return weights;
}

}  // namespace qwen2vl
