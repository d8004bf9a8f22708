#include <algorithm>
#include <cstring>

#include "base/half.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/panel_decoder.h"

namespace qwen2vl::cpu::generic {
namespace {

float to_float(float x) { return x; }
float f16(uint16_t x) { return f16_to_f32(x); }
float bf16(uint16_t x) { return bf16_to_f32(x); }

/// kRows rows by a panel: so many sums are in flight that additions do not wait for each other, and no more
/// than 16 registers of four hold. Multiply and add are rounded apart here: a fused one is a library call on
/// processors without it.
template <int64_t kRows, typename T, float (*Convert)(T)>
void multiply_rows(const float* a, int64_t a_stride, const T* panel, int64_t depth,
                   float (&sums)[kRows][kPanelRows]) {
  for (int64_t k = 0; k < depth; ++k) {
    float b[kPanelRows];
    for (int64_t r = 0; r < kPanelRows; ++r) b[r] = Convert(panel[k * kPanelRows + r]);
    for (int64_t m = 0; m < kRows; ++m) {
      const float x = a[m * a_stride + k];
      for (int64_t r = 0; r < kPanelRows; ++r) sums[m][r] += x * b[r];
    }
  }
}

template <int64_t kRows, typename T, float (*Convert)(T)>
void gemm_rows(const float* a, int64_t a_stride, const T* panel, int64_t depth, int64_t n, int64_t n_cols,
               const MatmulOutput& out, int64_t m) {
  float sums[kRows][kPanelRows] = {};
  multiply_rows<kRows, T, Convert>(a + m * a_stride, a_stride, panel, depth, sums);
  for (int64_t i = 0; i < kRows; ++i) {
    float* row = out.data + (m + i) * out.stride + n;
    for (int64_t r = 0; r < std::min(kPanelRows, n_cols - n); ++r) {
      const float sum = out.bias == nullptr ? sums[i][r] : sums[i][r] + out.bias[n + r];
      row[r] = out.store == Store::Accumulate ? row[r] + sum : sum;
    }
  }
}

template <typename T, float (*Convert)(T)>
void gemm(const float* a, int64_t a_stride, const T* b, int64_t panel_stride, int64_t rows, int64_t n_cols,
          int64_t depth, const MatmulOutput& out) {
  for (int64_t n = 0; n < n_cols; n += kPanelRows) {
    const T* panel = b + n / kPanelRows * panel_stride;
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2) gemm_rows<2, T, Convert>(a, a_stride, panel, depth, n, n_cols, out, m);
    if (m < rows) gemm_rows<1, T, Convert>(a, a_stride, panel, depth, n, n_cols, out, m);
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
