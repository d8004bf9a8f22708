#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::generic {
namespace {

template <typename A, typename B>
void gemm(const A* a, int64_t a_stride, const B* b, int64_t panel_stride, int64_t rows, int64_t n_cols,
          int64_t depth, const float* scales, const MatmulOutput& out) {
  constexpr int64_t kRun = 4 / sizeof(A);
  for (int64_t n = 0; n < n_cols; n += kPanelRows) {
    const B* panel = b + n / kPanelRows * panel_stride;
    for (int64_t m = 0; m < rows; ++m) {
      int32_t sums[kPanelRows] = {};
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < kPanelRows; ++r)
          sums[r] += a[m * a_stride + k] * panel[(k / kRun * kPanelRows + r) * kRun + k % kRun];
      float* row = out.data + m * out.stride + n;
      for (int64_t r = 0; r < std::min(kPanelRows, n_cols - n); ++r) {
        const auto sum = static_cast<float>(sums[r]);
        row[r] = out.store == Store::Accumulate ? std::fma(sum, scales[m], row[r]) : sum * scales[m];
      }
    }
  }
}

template <int Largest, typename T>
void softmax_steps(float* scores, int64_t stride, int64_t rows, int64_t n, float* maxima, float* sums,
                   float* factors, T* out, int64_t out_stride, float* scales, int64_t scales_stride) {
  for (int64_t r = 0; r < rows; ++r, scores += stride, out += out_stride) {
    const float before = maxima[r];
    maxima[r] = std::max(before, *std::max_element(scores, scores + n));
    factors[r] = std::exp2(before - maxima[r]);
    sums[r] *= factors[r];
    for (int64_t begin = 0; begin < n; begin += kPieceKeys) {
      const int64_t end = std::min(begin + kPieceKeys, n);
      const float top = *std::max_element(scores + begin, scores + end);
      float& scale = scales[begin / kPieceKeys * scales_stride + r];
      scale = std::exp2(top - maxima[r]) / Largest;
      int32_t sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        out[i] = static_cast<T>(std::nearbyint(Largest * std::exp2(scores[i] - top)));
        sum += out[i];
      }
      sums[r] += scale * static_cast<float>(sum);
    }
    std::fill(out + n, out + (n + kIntegerRoom - 1) / kIntegerRoom * kIntegerRoom, T{0});
  }
}

float quantize_i16(const float* x, const float* factors, int64_t n, float largest, int16_t* out) {
  float maximum = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i] * factors[i]);
    maximum = std::max(maximum, std::fabs(x[i] * factors[i]));
  }
  const float inverse = finite && maximum >= 1e-30f ? largest / maximum : 0.0f;
  for (int64_t i = 0; i < n; ++i)
    out[i] = inverse == 0 ? int16_t{0} : static_cast<int16_t>(std::nearbyint(x[i] * factors[i] * inverse));
  return !finite ? std::numeric_limits<float>::quiet_NaN() : inverse == 0 ? 0.0f : maximum / largest;
}

void round_i16(const float* x, const float* centers, const float* factors, int64_t n, int16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = (x[i] - centers[i]) * factors[i];
    out[i] = std::isfinite(value) ? static_cast<int16_t>(std::nearbyint(value)) : int16_t{0};
  }
}

}  // namespace

void add_integer_gemm(KernelTable& table) {
  table.gemm_i16 = gemm<int16_t, int16_t>;
  table.gemm_u8_i8 = gemm<uint8_t, int8_t>;
  table.softmax_steps_u8 = softmax_steps<255, uint8_t>;
  table.softmax_steps_i16 = softmax_steps<kLargest16, int16_t>;
  table.quantize_i16 = quantize_i16;
  table.round_i16 = round_i16;
}

}  // namespace qwen2vl::cpu::generic
