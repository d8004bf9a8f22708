#include <algorithm>
#include <cstring>

#include "cpu/kernels/generic/fused_add.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/panel_decoder.h"

namespace qwen2vl::cpu::generic {
namespace {

/// A whole panel: a row's values of a block side by side, [blocks][16][32], as 16-bit products want them;
/// scales and minima [cols / part][16].
struct DecodedPanel {
  int16_t* values;
  float* scales;
  float* minima;
};

/// A part of a panel with kBits a value.
template <int kBits>
class PackedBits {
 public:
  PackedBits(const uint8_t* part, const PanelLayout& layout) : part_(part), run_(layout.run_of(kBits)) {
    for (int64_t i = 0; i < kBits; ++i) offsets_[i] = layout.offset(kBits, 0, 0, 4 * i);
  }

  /// A block's integers, row by row.
  void read(int64_t block, uint8_t (&out)[kPanelRows * kBlock32]) const {
    constexpr int64_t kBytes = 4 * kBits;  // of a row
    const uint8_t* at = part_ + block * kBytes * kPanelRows;
    for (int64_t first = 0, shift = 0; first < kBlock32; first += kBytes, shift += kBits) {
      uint8_t values[kBytes * kPanelRows];
      for (int64_t i = 0; i < kBytes * kPanelRows; ++i)
        values[i] = static_cast<uint8_t>(at[i] >> shift & ((1 << kBits) - 1));
      for (int64_t i = 0; i < kBits; ++i)
        for (int64_t r = 0; r < kPanelRows; ++r)
          std::memcpy(out + r * kBlock32 + first + 4 * i, values + offsets_[i] + r * run_, 4);
    }
  }

 private:
  const uint8_t* part_;
  int64_t run_;
  int64_t offsets_[kBits];  // of four bytes each, in the first row
};

template <DType T>
void decode(const PanelMatrix& w, int64_t index, const DecodedPanel& out) {
  constexpr QuantFormat kFormat = traits_of(T).format;
  const PanelDecoder<T> decoder(w, index);
  for (int64_t part = 0; part < w.cols / kFormat.part; ++part) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      out.scales[part * kPanelRows + r] = decoder.scale(part * kFormat.part, r);
      if (kFormat.has_minimum) out.minima[part * kPanelRows + r] = decoder.minimum(part * kFormat.part, r);
    }
  }
  const PackedBits<kFormat.low_bits> low(w.panel(index), w.layout);
  const PackedBits<std::max(kFormat.high_bits, 1)> high(w.panel(index) + panel_parts(w.type, w.cols).high,
                                                        w.layout);
  for (int64_t block = 0; block < w.cols / kBlock32; ++block) {
    constexpr int64_t kValues = kPanelRows * kBlock32;
    uint8_t q[kValues], q_high[kValues];
    low.read(block, q);
    if constexpr (kFormat.high_bits > 0) {
      high.read(block, q_high);
      for (int64_t i = 0; i < kValues; ++i) q[i] = static_cast<uint8_t>(q[i] | q_high[i] << kFormat.low_bits);
    }
    for (int64_t i = 0; i < kValues; ++i)
      out.values[block * kValues + i] = static_cast<int16_t>(kFormat.value(q[i]));
  }
}

/// One row's activations; `next`: from a plane's to the next plane's value.
struct QuantizedRow {
  int planes;
  int64_t next;
  const int8_t* values;
  const float* scales;
  const int32_t* corrections;  ///< per part

  /// A block's integers; with two planes they count 256ths.
  void read(int64_t block, int16_t (&out)[kBlock32]) const {
    const int8_t* x = values + block * kBlock32;
    if (planes == 2)
      for (int k = 0; k < kBlock32; ++k) out[k] = static_cast<int16_t>(256 * x[k] + x[k + next]);
    else
      for (int k = 0; k < kBlock32; ++k) out[k] = x[k];
  }
};

/// A block's products, exact. The inner loop is what compilers make pairs of 16-bit products of.
void dot_block(const int16_t* weights, const int16_t* x, float (&dots)[kPanelRows]) {
  int32_t sums[kPanelRows];
  for (int64_t r = 0; r < kPanelRows; ++r) {
    int32_t sum = 0;
    for (int64_t k = 0; k < kBlock32; ++k) sum += weights[r * kBlock32 + k] * x[k];
    sums[r] = sum;
  }
  for (int64_t r = 0; r < kPanelRows; ++r) dots[r] = static_cast<float>(sums[r]);
}

/// The order of the sums is simd/matmul_q8.h's: exact integers within a scale, then one fused multiply-add,
/// and one of the part's minimum.
template <DType T>
void dot_row(const DecodedPanel& panel, const QuantizedRow& x, int64_t cols, float (&sums)[kPanelRows]) {
  constexpr QuantFormat kFormat = traits_of(T).format;
  constexpr int64_t kPart = kFormat.part, kParts = kBlock32 / kPart;
  std::fill(sums, sums + kPanelRows, 0.0f);
  for (int64_t block = 0; block < cols / kBlock32; ++block) {
    int16_t values[kBlock32], of_part[kBlock32];
    x.read(block, values);
    const float x_scale = x.planes == 2 ? x.scales[block] / 256 : x.scales[block];
    for (int64_t i = 0; i < kParts; ++i) {
      const int64_t part = block * kParts + i;
      for (int64_t k = 0; k < kBlock32; ++k) of_part[k] = k / kPart == i ? values[k] : int16_t{0};
      float dots[kPanelRows], scales[kPanelRows];
      dot_block(panel.values + block * kBlock32 * kPanelRows, of_part, dots);
      for (int64_t r = 0; r < kPanelRows; ++r) scales[r] = panel.scales[part * kPanelRows + r] * x_scale;
      fused_add(dots, scales, sums);
      if constexpr (kFormat.has_minimum) {
        const int32_t corrections = x.corrections[part];
        const int32_t sum =
            x.planes == 2 ? 2 * corrections + x.corrections[part + x.next / kPart] / 128 : corrections / 128;
        float minima[kPanelRows], minus_sums[kPanelRows];
        std::copy_n(panel.minima + part * kPanelRows, kPanelRows, minima);
        std::fill(minus_sums, minus_sums + kPanelRows, static_cast<float>(sum) * x_scale);
        fused_add(minima, minus_sums, sums);
      }
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
      decode<T>(w, p, decoded);
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
