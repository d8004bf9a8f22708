#include <cmath>
#include <limits>

#include "base/half.h"
#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::generic {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

double mean_square(const float* x, double centre, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += (x[i] - centre) * (x[i] - centre);
  return sum / static_cast<double>(n);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  const auto inverse = static_cast<float>(1.0 / std::sqrt(mean_square(x, 0.0, n) + eps));
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* out) {
  double mean = 0.0;
  for (int64_t i = 0; i < n; ++i) mean += x[i];
  mean /= static_cast<double>(n);
  const double inverse = 1.0 / std::sqrt(mean_square(x, mean, n) + eps);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<float>((x[i] - mean) * inverse) * weight[i] + bias[i];
  }
}

void silu_mul(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void quick_gelu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] / (1.0f + std::exp(-1.702f * x[i]));
}

void gelu(float* x, int64_t n) {
  constexpr float kSqrtHalf = 0.70710678118654752f;
  for (int64_t i = 0; i < n; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * kSqrtHalf));
}

void rope(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

float softmax_step(float* scores, int64_t n, float scale, float* maximum, float* sum) {
  float new_maximum = *maximum;
  for (int64_t i = 0; i < n; ++i) new_maximum = std::fmax(new_maximum, scores[i] * scale);
  if (new_maximum == -kInfinity) {  // all masked so far: exp(-inf - -inf) would be NaN
    for (int64_t i = 0; i < n; ++i) scores[i] = 0.0f;
    return 1.0f;
  }
  float total = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = std::exp(scores[i] * scale - new_maximum);
    total += scores[i];
  }
  const float rescale = std::exp(*maximum - new_maximum);
  *maximum = new_maximum;
  *sum = *sum * rescale + total;
  return rescale;
}

float block_maxima(const float* x, int64_t n, float* maxima) {
  float largest = 0;
  for (int64_t b = 0; b < n / kBlock32; ++b) {
    maxima[b] = 0;
    for (int64_t i = b * kBlock32; i < (b + 1) * kBlock32; ++i)
      maxima[b] = std::max(maxima[b], std::fabs(x[i]));
    largest = std::max(largest, maxima[b]);
  }
  return largest;
}

float sum_capped(const float* x, float cap, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::min(std::fabs(x[i]), cap);
  return sum;
}

void scale_row(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

void add_row(float* y, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

void convert_f32_to_f16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_to_f16(x[i]);
}

}  // namespace

void add_rows(KernelTable& table) {
  table.rms_norm = rms_norm;
  table.layer_norm = layer_norm;
  table.silu_mul = silu_mul;
  table.quick_gelu = quick_gelu;
  table.gelu = gelu;
  table.rope = rope;
  table.softmax_step = softmax_step;
  table.block_maxima = block_maxima;
  table.sum_capped = sum_capped;
  table.scale_row = scale_row;
  table.add_row = add_row;
  table.convert_f32_to_f16 = convert_f32_to_f16;
}

}  // namespace qwen2vl::cpu::generic
