#include "quant/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "base/half.h"
#include "quant/formats.h"
#include "quant/quantize_q6_k.h"

namespace qwen2vl {
namespace {

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

void quantize_block(const float* x, int32_t magnitude, Block<DType::Q4_0>* out) {
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

void quantize_block(const float* x, int32_t magnitude, Block<DType::Q8_0>* out) {
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

void quantize_block(const float* x, int32_t, Block<DType::Q6_K>* out) { quantize_q6_k(x, out); }

[[noreturn]] void refuse_not_finite(DType type, const float* begin, const float* block, int64_t cols) {
  const float* value = std::find_if_not(block, block + cols, [](float v) { return std::isfinite(v); });
  throw std::invalid_argument(std::string(dtype_traits(type).name) + " holds finite values only; column " +
                              std::to_string((value - begin) % cols) + " of a row is " +
                              std::to_string(*value));
}

template <DType T>
void quantize_blocks(const float* values, int64_t rows, int64_t cols, uint8_t* out) {
  constexpr int64_t kElements = traits_of(T).block_elements;
  const float* end = values + rows * cols;
  for (const float* x = values; x != end; x += kElements, out += sizeof(Block<T>)) {
    const int32_t magnitude = max_magnitude<kElements>(x);
    if (magnitude >= kInfinity) refuse_not_finite(T, values, x, cols);
    Block<T> block;  // `out` need not be aligned
    quantize_block(x, magnitude, &block);
    std::memcpy(out, &block, sizeof block);
  }
}

void convert(uint16_t (*narrow)(float), const float* values, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t half = narrow(values[i]);
    std::memcpy(out + i * 2, &half, sizeof half);
  }
}

}  // namespace

void quantize_rows(DType type, const float* values, int64_t rows, int64_t cols, uint8_t* out) {
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
    else
      quantize_blocks<T>(values, rows, cols, out);
  });
}

}  // namespace qwen2vl
