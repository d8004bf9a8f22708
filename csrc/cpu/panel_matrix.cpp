#include "cpu/panel_matrix.h"

#include <algorithm>
#include <cstring>

#include "cpu/panel_decoder.h"
#include "quant/open_block.h"

namespace qwen2vl::cpu {
namespace {

uint32_t load_u32(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

void store_u32(uint8_t* p, uint32_t word) { std::memcpy(p, &word, sizeof word); }

/// values [cols][16]. A strip of each row is read at a time: rows whose length is a power of two share their
/// cache sets, so that column after column would evict the lines before they are used up.
template <typename T>
void pack_values(const uint8_t* matrix, int64_t row_stride, int64_t lanes, int64_t cols, uint8_t* out) {
  constexpr int64_t kStrip = 64 / sizeof(T);
  for (int64_t begin = 0; begin < cols; begin += kStrip) {
    const int64_t n = std::min(kStrip, cols - begin);
    T strip[kStrip][kPanelRows] = {};
    for (int64_t r = 0; r < lanes; ++r) {
      T values[kStrip];
      std::memcpy(values, matrix + r * row_stride + begin * sizeof(T), n * sizeof(T));
      for (int64_t k = 0; k < n; ++k) strip[k][r] = values[k];
    }
    std::memcpy(out + begin * kPanelRows * sizeof(T), strip, n * kPanelRows * sizeof(T));
  }
}

/// A part of a panel with kBits bits a value.
template <int kBits>
struct PackedBits {
  uint8_t* data;
  int64_t row;           ///< bytes from a row to the next
  int64_t words[kBits];  ///< where the 4-byte words of a row's block stand

  PackedBits(uint8_t* data_, const PanelLayout& layout) : data(data_), row(layout.run_of(kBits)) {
    for (int i = 0; i < kBits; ++i) words[i] = layout.offset(kBits, 0, 0, 4 * i);
  }

  /// Block b of row r: of 32 integers, the bits from kShift on.
  template <int kShift = 0>
  void pack(const uint8_t* q, int64_t b, int64_t r) const {
    const auto bits = [&](int group, int from, int n) {
      return load_u32(q + 4 * group) >> from & 0x01010101u * ((1u << n) - 1);
    };
    uint8_t* block = data + b * 4 * kBits * kPanelRows + r * row;
    for (int i = 0; i < kBits; ++i) {
      uint32_t word = 0;
      if constexpr (kBits == 3) {
        const uint32_t rest =
            i < 2 ? bits(3 + 4 * i, kShift, 2) : bits(3, kShift + 2, 1) | bits(7, kShift + 2, 1) << 1;
        word = bits(i, kShift, 3) | bits(4 + i, kShift, 3) << 3 | rest << 6;
      } else {
        for (int field = 0; field < 8 / kBits; ++field)
          word |= bits(kBits * field + i, kShift, kBits) << (kBits * field);
      }
      store_u32(block + words[i], word);
    }
  }
};
template <>
struct PackedBits<0> {
  PackedBits(uint8_t*, const PanelLayout&) {}
  template <int kShift>
  void pack(const uint8_t*, int64_t, int64_t) const {}
};

template <DType T>
void pack_blocks(const uint8_t* rows, int64_t row_stride, int64_t lanes, const PanelMatrix& packed,
                 uint8_t* out) {
  constexpr DTypeTraits kTraits = traits_of(T);
  constexpr QuantFormat kFormat = kTraits.format;
  constexpr int64_t kBlocks32 = kTraits.block_elements / kBlock32,
                    kParts = kTraits.block_elements / kFormat.part;
  const PanelParts parts = panel_parts(T, packed.cols);
  const PackedBits<kFormat.low_bits> low(out, packed.layout);
  const PackedBits<kFormat.high_bits> high(out + parts.high, packed.layout);
  OpenBlock block;
  for (int64_t i = 0; i < packed.cols / kTraits.block_elements; ++i) {
    for (int64_t r = 0; r < lanes; ++r) {
      open_block_at<T>(rows + r * row_stride + i * kTraits.block_bytes, block);
      for (int64_t b = 0; b < kBlocks32; ++b) {
        low.pack(block.q + b * kBlock32, i * kBlocks32 + b, r);
        high.template pack<kFormat.low_bits>(block.q + b * kBlock32, i * kBlocks32 + b, r);
      }
      if constexpr (kFormat.scale_bits == 4)
        for (int64_t p = 0; p < kParts; ++p) block.scales[p] |= static_cast<int8_t>(block.minima[p] << 4);
      const auto pack_scales = [&](int64_t values, int64_t block_values, uint16_t half, const int8_t* bytes) {
        if constexpr (kFormat.scale_bits < 16)
          for (int64_t p = 0; p < kParts; ++p)
            out[values + (i * kParts + p) * kPanelRows + r] = static_cast<uint8_t>(bytes[p]);
        std::memcpy(out + (kFormat.scale_bits < 16 ? block_values : values) + (i * kPanelRows + r) * 2, &half,
                    2);
      };
      pack_scales(parts.scales, parts.block_scales, block.d, block.scales);
      if constexpr (kFormat.has_minimum)
        pack_scales(parts.minima, parts.block_minima, block.m,
                    kFormat.scale_bits == 4 ? block.scales : block.minima);
    }
  }
}

}  // namespace

PanelParts panel_parts(DType type, int64_t cols) {
  const DTypeTraits& traits = dtype_traits(type);
  const QuantFormat& format = traits.format;
  PanelParts parts;
  if (format.bits() == 0) {
    parts.bytes = cols * kPanelRows * traits.block_bytes;
  } else {
    const bool share = format.scale_bits == 4;  // scales and minima their bytes
    const int64_t scales = cols / format.part * kPanelRows * (format.scale_bits == 16 ? 2 : 1);
    const int64_t block_scales = format.scale_bits < 16 ? cols / kBlock256 * kPanelRows * 2 : 0;
    parts.high = cols * kPanelRows * format.low_bits / 8;
    parts.scales = parts.high + cols * kPanelRows * format.high_bits / 8;
    parts.block_scales = parts.scales + scales;
    const int64_t end = parts.block_scales + block_scales;
    parts.minima = share ? parts.scales : end;
    parts.block_minima = end + (format.has_minimum && !share ? scales : 0);
    parts.bytes = parts.block_minima + (format.has_minimum ? block_scales : 0);
  }
  parts.bytes = (parts.bytes + 63) / 64 * 64;
  return parts;
}

void pack_panel(const PanelMatrix& packed, const uint8_t* source, int64_t rows, int64_t panel, uint8_t* out) {
  const int64_t row_stride = row_bytes(packed.type, packed.cols);
  const int64_t lanes = std::min(kPanelRows, rows - panel * kPanelRows);
  const uint8_t* first = source + panel * kPanelRows * row_stride;
  if (lanes < kPanelRows) std::memset(out, 0, packed.panel_bytes);
  visit_dtype(packed.type, [&]<DType T>() {
    if constexpr (T == DType::F32)
      pack_values<uint32_t>(first, row_stride, lanes, packed.cols, out);
    else if constexpr (T == DType::F16 || T == DType::BF16)
      pack_values<uint16_t>(first, row_stride, lanes, packed.cols, out);
    else
      pack_blocks<T>(first, row_stride, lanes, packed, out);
  });
}

void dequantize_panel_row(const PanelMatrix& matrix, int64_t row, float* out) {
  const int64_t index = row / kPanelRows, r = row % kPanelRows;
  const uint8_t* panel = matrix.panel(index);
  visit_dtype(matrix.type, [&]<DType T>() {
    const auto fill = [&](const auto& value) {
      for (int64_t k = 0; k < matrix.cols; ++k) out[k] = value(k);
    };
    const auto half = [&](int64_t k) {
      uint16_t bits;
      std::memcpy(&bits, panel + (k * kPanelRows + r) * 2, sizeof bits);
      return bits;
    };
    if constexpr (T == DType::F32) {
      for (int64_t k = 0; k < matrix.cols; ++k) std::memcpy(out + k, panel + (k * kPanelRows + r) * 4, 4);
    } else if constexpr (T == DType::F16) {
      fill([&](int64_t k) { return f16_to_f32(half(k)); });
    } else if constexpr (T == DType::BF16) {
      fill([&](int64_t k) { return bf16_to_f32(half(k)); });
    } else {
      const PanelDecoder<T> decoder(matrix, index);
      fill([&](int64_t k) { return decoder.value(k, r); });
    }
  });
}

}  // namespace qwen2vl::cpu
