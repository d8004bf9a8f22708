#include <algorithm>
#include <cmath>

#include "cpu/kernels/isa_kernels.h"
#include "cpu/panel_decoder.h"

namespace qwen2vl::cpu::generic {
namespace {

/// A whole panel: values [cols][16], scales and minima [cols / part][16].
struct DecodedPanel {
  int16_t* values;
  float* scales;
  float* minima;
};

template <DType T>
void decode(const PanelDecoder<T>& decoder, int64_t cols, const DecodedPanel& out) {
  constexpr QuantFormat kFormat = PanelDecoder<T>::kFormat;
  for (int64_t k = 0; k < cols; ++k) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      out.values[k * kPanelRows + r] = static_cast<int16_t>(decoder.quant(k, r));
      if (k % kFormat.part != 0) continue;
      out.scales[k / kFormat.part * kPanelRows + r] = decoder.scale(k, r);
      if (kFormat.has_minimum) out.minima[k / kFormat.part * kPanelRows + r] = decoder.minimum(k, r);
    }
  }
}

/// One row's activations; `next`: from a plane's to the next plane's value.
struct QuantizedRow {
  int planes;
  int64_t next;
  const int8_t* values;
  const float* scales;
  const int32_t* corrections;  ///< per part
};

/// The order of the sums is simd/matmul_q8.h's: exact integers within a scale, then one fused multiply-add,
/// and one of the part's minimum. With two planes the integers count 256ths.
template <DType T>
void dot_row(const DecodedPanel& panel, const QuantizedRow& x, int64_t cols, float (&sums)[kPanelRows]) {
  constexpr QuantFormat kFormat = traits_of(T).format;
  std::fill(sums, sums + kPanelRows, 0.0f);
  for (int64_t begin = 0; begin < cols; begin += kFormat.part) {
    int32_t dots[kPanelRows] = {};
    for (int64_t k = begin; k < begin + kFormat.part; ++k) {
      const int16_t* values = panel.values + k * kPanelRows;
      const int32_t value = x.planes == 2 ? 256 * x.values[k] + x.values[k + x.next] : x.values[k];
      for (int64_t r = 0; r < kPanelRows; ++r) dots[r] += values[r] * value;
    }
    const int64_t part = begin / kFormat.part;
    const float block_scale = x.scales[begin / kBlock32];
    const float x_scale = x.planes == 2 ? block_scale / 256 : block_scale;
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const float scale = panel.scales[part * kPanelRows + r] * x_scale;
      sums[r] = std::fma(static_cast<float>(dots[r]), scale, sums[r]);
    }
    if constexpr (kFormat.has_minimum) {
      const int32_t corrections = x.corrections[part];
      const int32_t sum = x.planes == 2 ? 2 * corrections + x.corrections[part + x.next / kFormat.part] / 128
                                        : corrections / 128;
      const float minus_sum = static_cast<float>(sum) * x_scale;
      for (int64_t r = 0; r < kPanelRows; ++r)
        sums[r] = std::fma(panel.minima[part * kPanelRows + r], minus_sum, sums[r]);
    }
  }
}

void matmul_q8(const PanelMatrix& w, const QuantizedRows& x, const MatmulTask& task, const MatmulOutput& out,
               std::byte* scratch) {
  const int64_t cols = w.cols, blocks = cols / kBlock32;
  auto* values = reinterpret_cast<int16_t*>(scratch);
  auto* scales = reinterpret_cast<float*>(values + cols * kPanelRows);
  const DecodedPanel decoded{values, scales, scales + 2 * blocks * kPanelRows};  // parts of 16 or 32
  visit_quantized(w.type, [&]<DType T>() {
    constexpr int64_t kParts = kBlock32 / traits_of(T).format.part;
    for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
      decode(PanelDecoder<T>(w, p), cols, decoded);
      const int64_t n = p * kPanelRows, lanes = std::min(kPanelRows, w.rows - n);
      for (int64_t m = task.row_begin; m < task.row_end; ++m) {
        float sums[kPanelRows];
        dot_row<T>(decoded,
                   {x.planes, x.rows * cols, x.values + m * cols, x.scales + m * blocks,
                    kParts == 2 ? x.corrections16 + 2 * m * blocks : x.corrections32 + m * blocks},
                   cols, sums);
        float* row = out.data + m * out.stride + n;
        for (int64_t r = 0; r < lanes; ++r) {
          const float sum = out.bias == nullptr ? sums[r] : sums[r] + out.bias[n + r];
          row[r] = out.store == Store::Accumulate ? row[r] + sum : sum;
        }
      }
    }
  });
}

}  // namespace

void add_matmul_q8(KernelTable& table) { table.matmul_q8 = matmul_q8; }

}  // namespace qwen2vl::cpu::generic
