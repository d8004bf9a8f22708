#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels/isa_kernels.h"

namespace qwen2vl::cpu::generic {
namespace {

/// scale = max|x| / 127, values = round-to-nearest-even(x * (127 / max|x|)), one rounding per operation: the
/// same bits on every instruction set. |x| * (127 / max|x|) is at most 127 (1 + 2^-23), which rounds to 127.
/// Below 1e-30, where 127 / max|x| could overflow, a block counts as zeros. A block with a NaN or an infinity
/// gets the scale NaN and zeros: its row's results are NaN, as they would be without quantization.
/// What is left, x - scale * value, is at most half a scale; `rest`, where it is wanted, has that in 256ths.
void quantize_block(const float* x, int8_t* values, int8_t* rest, float* scale) {
  float maximum = 0.0f;
  bool finite = true;
  for (int i = 0; i < kBlock32; ++i) {
    const float magnitude = std::fabs(x[i]);
    finite = finite && std::isfinite(x[i]);
    if (magnitude > maximum) maximum = magnitude;
  }
  const bool zeros = !finite || maximum < 1e-30f;
  const float inverse = zeros ? 0.0f : 127.0f / maximum;
  *scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zeros ? 0.0f : maximum / 127.0f;
  for (int i = 0; i < kBlock32; ++i) {
    const float rounded = zeros ? 0.0f : std::nearbyint(x[i] * inverse);
    values[i] = static_cast<int8_t>(rounded);
    if (rest == nullptr) continue;
    const float left = zeros ? 0.0f : std::fma(rounded, -*scale, x[i]) * (inverse * 256.0f);
    rest[i] = static_cast<int8_t>(std::clamp(std::nearbyint(left), -127.0f, 127.0f));
  }
}

void quantize_rows(const float* x, int64_t x_stride, int64_t rows, const QuantizedRows& out,
                   int64_t row_begin) {
  const int64_t blocks = out.cols / kBlock32;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t m = row_begin + i;
    for (int64_t b = 0; b < blocks; ++b) {
      int8_t* values = out.values + m * out.cols + b * kBlock32;
      quantize_block(x + i * x_stride + b * kBlock32, values,
                     out.planes == 2 ? values + out.rows * out.cols : nullptr, out.scales + m * blocks + b);
      for (int plane = 0; plane < out.planes; ++plane) {
        const int64_t block = (plane * out.rows + m) * blocks + b;
        int32_t sums[2] = {0, 0};
        for (int k = 0; k < kBlock32; ++k) sums[k / 16] += out.values[block * kBlock32 + k];
        out.corrections16[2 * block] = -128 * sums[0];
        out.corrections16[2 * block + 1] = -128 * sums[1];
        out.corrections32[block] = -128 * (sums[0] + sums[1]);
      }
    }
  }
}

}  // namespace

void add_quantize_rows(KernelTable& table) { table.quantize_rows = quantize_rows; }

}  // namespace qwen2vl::cpu::generic
