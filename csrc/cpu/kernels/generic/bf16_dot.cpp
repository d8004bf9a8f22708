#include <algorithm>
#include <cmath>

#include "base/half.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::generic {
namespace {

void gemm_bf16_pairs(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t panel_stride,
                     int64_t rows, int64_t n_cols, int64_t depth, const MatmulOutput& out) {
  for (int64_t n = 0; n < n_cols; n += kPanelRows) {
    const uint16_t* panel = b + n / kPanelRows * panel_stride;
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t r = 0; r < std::min(kPanelRows, n_cols - n); ++r) {
        float sum = 0;
        for (int64_t k = 0; k < depth; ++k)
          sum += bf16_to_f32(a[m * a_stride + k]) * bf16_to_f32(panel[(k / 2 * kPanelRows + r) * 2 + k % 2]);
        if (out.bias != nullptr) sum += out.bias[n + r];
        float& result = out.data[m * out.stride + n + r];
        result = out.store == Store::Accumulate ? result + sum : sum;
      }
    }
  }
}

void softmax_steps_bf16(const float* scores, int64_t stride, int64_t rows, int64_t n, float scale,
                        float* maxima, float* sums, float* factors, uint16_t* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, scores += stride, out += out_stride) {
    float maximum = maxima[r];
    for (int64_t i = 0; i < n; ++i) maximum = std::max(maximum, scores[i] * scale);
    float total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float e = std::exp(scores[i] * scale - maximum);
      total += e;
      out[i] = f32_to_bf16(e);
    }
    factors[r] = std::exp(maxima[r] - maximum);
    maxima[r] = maximum;
    sums[r] = sums[r] * factors[r] + total;
  }
}

void convert_f32_to_bf16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_to_bf16(x[i]);
}

}  // namespace

void add_bf16_dot(KernelTable& table) {
  table.gemm_bf16_pairs = gemm_bf16_pairs;
  table.softmax_steps_bf16 = softmax_steps_bf16;
  table.convert_f32_to_bf16 = convert_f32_to_bf16;
}

}  // namespace qwen2vl::cpu::generic
