#include <algorithm>
#include <cstring>
#include <type_traits>

#include "base/half.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/panel_decoder.h"

namespace qwen2vl::cpu::generic {
namespace {

float to_float(float x) { return x; }
float f16(uint16_t x) { return f16_to_f32(x); }
float bf16(uint16_t x) { return bf16_to_f32(x); }

/// Adds kSteps columns' products to a row's sums, column by column: so many are added while a sum is in a
/// register. Multiply and add are rounded apart: a fused one is a library call on processors without it.
template <int64_t kSteps>
void add_products(const float* a, const float* panel, float (&sums)[kPanelRows]) {
  float x[kSteps];
  std::copy_n(a, kSteps, x);
  for (int64_t r = 0; r < kPanelRows; ++r) {
    float sum = sums[r];
    for (int64_t k = 0; k < kSteps; ++k) sum += x[k] * panel[k * kPanelRows + r];
    sums[r] = sum;
  }
}

template <int64_t kSteps, typename T, float (*Convert)(T)>
void add_converted(const float* a, const T* panel, float (&sums)[kPanelRows]) {
  if constexpr (std::is_same_v<T, float>) {
    add_products<kSteps>(a, panel, sums);
  } else {
    float converted[kSteps * kPanelRows];
    std::transform(panel, panel + kSteps * kPanelRows, converted, Convert);
    add_products<kSteps>(a, converted, sums);
  }
}

template <typename T, float (*Convert)(T)>
void gemm(const float* a, int64_t a_stride, const T* b, int64_t panel_stride, int64_t rows, int64_t n_cols,
          int64_t depth, const MatmulOutput& out) {
  constexpr int64_t kSteps = 8;
  for (int64_t n = 0; n < n_cols; n += kPanelRows) {
    const T* panel = b + n / kPanelRows * panel_stride;
    const int64_t lanes = std::min(kPanelRows, n_cols - n);
    for (int64_t m = 0; m < rows; ++m) {
      float sums[kPanelRows] = {};
      int64_t k = 0;
      for (; k + kSteps <= depth; k += kSteps)
        add_converted<kSteps, T, Convert>(a + m * a_stride + k, panel + k * kPanelRows, sums);
      for (; k < depth; ++k) add_converted<1, T, Convert>(a + m * a_stride + k, panel + k * kPanelRows, sums);
      float* row = out.data + m * out.stride + n;
      for (int64_t r = 0; r < lanes; ++r) {
        const float sum = out.bias == nullptr ? sums[r] : sums[r] + out.bias[n + r];
        row[r] = out.store == Store::Accumulate ? row[r] + sum : sum;
      }
    }
  }
}

void gemm_f16_ahead(const float* a, int64_t a_stride, const uint16_t* b, int64_t panel_stride, int64_t rows,
                    int64_t n_cols, int64_t depth, const MatmulOutput& out, const uint16_t*) {
  gemm<uint16_t, f16>(a, a_stride, b, panel_stride, rows, n_cols, depth, out);
}

void unpack_panel(const PanelMatrix& w, int64_t index, float* out) {
  const uint8_t* panel = w.panel(index);
  const int64_t n = w.cols * kPanelRows;
  visit_dtype(w.type, [&]<DType T>() {
    if constexpr (T == DType::F32) {
      std::memcpy(out, panel, n * sizeof(float));
    } else if constexpr (T == DType::F16 || T == DType::BF16) {
      for (int64_t i = 0; i < n; ++i) {
        uint16_t half;
        std::memcpy(&half, panel + 2 * i, sizeof half);
        out[i] = T == DType::F16 ? f16(half) : bf16(half);
      }
    } else {
      const PanelDecoder<T> decoder(w, index);
      for (int64_t i = 0; i < n; ++i) out[i] = decoder.value(i / kPanelRows, i % kPanelRows);
    }
  });
}

void unpack_columns(const PanelMatrix& w, int64_t panel, const int32_t* columns, int64_t n, float* out) {
  visit_quantized(w.type, [&]<DType T>() {
    const PanelDecoder<T> decoder(w, panel);
    for (int64_t i = 0; i < n * kPanelRows; ++i)
      out[i] = decoder.value(columns[i / kPanelRows], i % kPanelRows);
  });
}

}  // namespace

void add_gemm(KernelTable& table) {
  table.unpack_panel = unpack_panel;
  table.unpack_columns = unpack_columns;
  table.gemm_f32 = gemm<float, to_float>;
  table.gemm_f16 = gemm<uint16_t, f16>;
  table.gemm_f16_ahead = gemm_f16_ahead;
  table.gemm_bf16 = gemm<uint16_t, bf16>;
}

}  // namespace qwen2vl::cpu::generic
