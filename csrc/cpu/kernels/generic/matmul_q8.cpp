#include <algorithm>
#include <cstring>

#include "cpu/kernels/generic/fused_add.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/panel_decoder.h"

namespace qwen2vl::cpu::generic {
namespace {

/// A whole panel: a row's values of a block side by side, [blocks][16][32], as 16-bit products want them;
/// scales and minima [cols / part][16]. Where QuantFormat::scales_integers, the values have been multiplied
/// by their parts' scales, scales are the blocks' [cols / 256][16], and minima are integers, too, of blocks
/// with block_minima.
struct DecodedPanel {
  int16_t* values;
  float* scales;
  float* minima;
  float* block_minima;
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
    if constexpr (kBits == 3) return read_threes(at, out);
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
  static void read_threes(const uint8_t* at, uint8_t (&out)[kPanelRows * kBlock32]) {
    constexpr int64_t kWords = 4 * kPanelRows;  // bytes of all rows
    for (int64_t group = 0; group < 8; ++group) {
      const int64_t word = group % 4, half = group / 4;
      uint8_t values[kWords];
      for (int64_t i = 0; i < kWords; ++i)
        values[i] = static_cast<uint8_t>(word < 3 ? at[word * kWords + i] >> 3 * half & 7
                                                  : at[half * kWords + i] >> 6 |
                                                        (at[2 * kWords + i] >> (6 + half) & 1) << 2);
      for (int64_t r = 0; r < kPanelRows; ++r) std::memcpy(out + r * kBlock32 + 4 * group, values + 4 * r, 4);
    }
  }

  const uint8_t* part_;
  int64_t run_;
  int64_t offsets_[kBits];  // of four bytes each, in the first row
};

template <DType T>
void decode(const PanelMatrix& w, int64_t index, const DecodedPanel& out) {
  constexpr QuantFormat kFormat = traits_of(T).format;
  const PanelDecoder<T> decoder(w, index);
  constexpr bool kIntegers = kFormat.scales_integers();
  for (int64_t part = 0; part < w.cols / kFormat.part; ++part) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const int64_t k = part * kFormat.part, at = part * kPanelRows + r;
      if constexpr (!kIntegers) out.scales[at] = decoder.scale(k, r);
      if constexpr (kFormat.has_minimum)
        out.minima[at] = kIntegers ? static_cast<float>(decoder.part_minimum(k, r)) : decoder.minimum(k, r);
    }
  }
  if constexpr (kIntegers) {
    for (int64_t i = 0; i < w.cols / kBlock256; ++i) {
      for (int64_t r = 0; r < kPanelRows; ++r) {
        out.scales[i * kPanelRows + r] = decoder.block_scale(i * kBlock256, r);
        if (kFormat.has_minimum)
          out.block_minima[i * kPanelRows + r] = decoder.block_minimum(i * kBlock256, r);
      }
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
    int16_t* values = out.values + block * kValues;
    for (int64_t i = 0; i < kValues; ++i) values[i] = static_cast<int16_t>(kFormat.value(q[i]));
    if constexpr (kIntegers) {
      for (int64_t part = 0; part < kValues; part += kFormat.part) {
        const int64_t k = block * kBlock32 + part % kBlock32, r = part / kBlock32;
        const auto scale = static_cast<int16_t>(decoder.part_scale(k, r));
        int16_t scaled[kFormat.part];
        for (int64_t i = 0; i < kFormat.part; ++i) scaled[i] = static_cast<int16_t>(values[part + i] * scale);
        std::copy_n(scaled, kFormat.part, values + part);
      }
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

  /// A block's integers; with two planes they count 256ths.
  void read(int64_t block, int16_t (&out)[kBlock32]) const {
    const int8_t* x = values + block * kBlock32;
    if (planes == 2)
      for (int k = 0; k < kBlock32; ++k) out[k] = static_cast<int16_t>(256 * x[k] + x[k + next]);
    else
      for (int k = 0; k < kBlock32; ++k) out[k] = x[k];
  }

  /// What read()'s integers count.
  float scale(int64_t block) const { return planes == 2 ? scales[block] / 256 : scales[block]; }

  /// Minus the sum of a part's integers.
  int32_t minus_sum(int64_t part, int64_t columns) const {
    return planes == 2 ? 2 * corrections[part] + corrections[part + next / columns] / 128
                       : corrections[part] / 128;
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
    const float x_scale = x.scale(block);
    for (int64_t i = 0; i < kParts; ++i) {
      const int64_t part = block * kParts + i;
      for (int64_t k = 0; k < kBlock32; ++k) of_part[k] = k / kPart == i ? values[k] : int16_t{0};
      float dots[kPanelRows], scales[kPanelRows];
      dot_block(panel.values + block * kBlock32 * kPanelRows, of_part, dots);
      for (int64_t r = 0; r < kPanelRows; ++r) scales[r] = panel.scales[part * kPanelRows + r] * x_scale;
      fused_add(dots, scales, sums);
      if constexpr (kFormat.has_minimum) {
        float minima[kPanelRows], minus_sums[kPanelRows];
        std::copy_n(panel.minima + part * kPanelRows, kPanelRows, minima);
        std::fill(minus_sums, minus_sums + kPanelRows,
                  static_cast<float>(x.minus_sum(part, kPart)) * x_scale);
        fused_add(minima, minus_sums, sums);
      }
    }
  }
}

/// The same where QuantFormat::scales_integers.
template <DType T>
  requires(traits_of(T).format.scales_integers())
void dot_row(const DecodedPanel& panel, const QuantizedRow& x, int64_t cols, float (&sums)[kPanelRows]) {
  constexpr QuantFormat kFormat = traits_of(T).format;
  constexpr int64_t kPart = kFormat.part, kBlocks = kBlock256 / kBlock32;
  const auto add_scaled = [&](const float* scales, const float (&group)[kPanelRows]) {
    float factors[kPanelRows];
    std::copy_n(scales, kPanelRows, factors);
    fused_add(group, factors, sums);
  };
  std::fill(sums, sums + kPanelRows, 0.0f);
  for (int64_t i = 0; i < cols / kBlock256; ++i) {
    float group[kPanelRows] = {}, minima[kPanelRows] = {};
    for (int64_t block = i * kBlocks; block < (i + 1) * kBlocks; ++block) {
      int16_t values[kBlock32];
      x.read(block, values);
      float integers[kPanelRows], x_scales[kPanelRows];
      std::fill(x_scales, x_scales + kPanelRows, x.scale(block));
      dot_block(panel.values + block * kBlock32 * kPanelRows, values, integers);
      fused_add(integers, x_scales, group);
      if constexpr (kFormat.has_minimum) {
        const float first = static_cast<float>(x.minus_sum(2 * block, kPart)),
                    second = static_cast<float>(x.minus_sum(2 * block + 1, kPart));
        const float* of_parts = panel.minima + 2 * block * kPanelRows;
        for (int64_t r = 0; r < kPanelRows; ++r)  // integers that floats hold
          integers[r] = of_parts[r] * first + of_parts[kPanelRows + r] * second;
        fused_add(integers, x_scales, minima);
      }
    }
    add_scaled(panel.scales + i * kPanelRows, group);
    if constexpr (kFormat.has_minimum) add_scaled(panel.block_minima + i * kPanelRows, minima);
  }
}

void matmul_q8(const PanelMatrix& w, const QuantizedRows& x, const MatmulTask& task, const MatmulOutput& out,
               std::byte* scratch) {
  const int64_t cols = w.cols, blocks = cols / kBlock32;
  auto* values = reinterpret_cast<int16_t*>(scratch);
  auto* scales = reinterpret_cast<float*>(values + cols * kPanelRows);
  const int64_t parts = 2 * blocks * kPanelRows;  // of 16 or 32 columns
  const DecodedPanel decoded{values, scales, scales + parts, scales + 2 * parts};
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
