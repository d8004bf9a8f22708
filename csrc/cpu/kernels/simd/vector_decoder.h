#pragma once

// The decode step of all kernels, written once; needs the including instruction set's simd.h.

#include <string.h>

#include <bit>

#include "cpu/kernels/simd/tile.h"
#include "quant/formats.h"

namespace qwen2vl::cpu {
namespace {

inline const uint16_t* as_16_bits(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

/// A byte in every byte of a vector.
inline IntVec set1_bytes(int byte) { return set1_int(static_cast<int32_t>(0x01010101u * (byte & 0xffu))); }

/// Four activations, in every lane.
inline IntVec broadcast_group(const int8_t* x) {
  int32_t group;
  memcpy(&group, x, sizeof group);
  return set1_int(group);
}

/// Bits may cross from byte to byte: the caller masks them.
inline IntVec shifted(IntVec x, int left) {
  return left == 0 ? x : left > 0 ? shift_left(x, left) : shift_right(x, -left);
}

/// Four consecutive columns of every row of a panel, a byte each.
inline constexpr int64_t kGroupBytes = kPanelRows * 4;

/// The vectors of a quantized panel and of those after it, kLanes rows each: vector v counts from the first
/// panel on, b are blocks of 32 columns (see PanelMatrix). The layout has runs of kPanelRun: 4 or 8.
template <DType T>
struct VectorDecoder {
  static constexpr QuantFormat kFormat = traits_of(T).format;
  static constexpr int kParts = static_cast<int>(kBlock32) / kFormat.part;  // of a block
  static_assert(!kFormat.has_minimum || kFormat.offset == 0);

  const uint8_t *low, *high, *scales, *block_scales, *minima, *block_minima;
  int64_t panel_bytes;

  VectorDecoder(const PanelMatrix& w, int64_t panel)
      : low(w.data + panel * w.panel_bytes), panel_bytes(w.panel_bytes) {
    const PanelParts parts = panel_parts(w.type, w.cols);
    high = low + parts.high;
    scales = low + parts.scales;
    block_scales = low + parts.block_scales;
    minima = low + parts.minima;
    block_minima = low + parts.block_minima;
  }

  /// Where vector v begins, in parts with `bytes` per row.
  int64_t offset(int v, int bytes) const {
    return v / kVectorsPerPanel * panel_bytes + v % kVectorsPerPanel * kLanes * bytes;
  }

  /// Where vector v of a block begins, in a part with kBits bits a value; its words of 4 bytes, in runs of
  /// kPanelRun bytes a row.
  template <int kBits>
  const uint8_t* block(const uint8_t* part, int64_t b, int v) const {
    return part + offset(v, kBits % 2 == 1 ? 4 : kPanelRun) + b * kBits * kGroupBytes;
  }

  /// Where the low bits of group g (0..7: four consecutive columns) lie.
  const uint8_t* group(int64_t b, int g, int v) const {
    constexpr int m = kFormat.low_bits, kWords = m == 3 ? 1 : kPanelRun / 4;
    return block<m>(low, b, v) + g % m / kWords * kWords * kGroupBytes;
  }

  /// The group's integers, a byte each: signed as they are multiplied (QuantFormat::is_signed), or unsigned
  /// with their offset, times 2^shift.
  IntVec quants(int64_t b, int g, int v, int shift = 0) const {
    constexpr int m = kFormat.low_bits, n = kFormat.high_bits;
    if constexpr (m == 8) return word<m>(low, b, g, v);
    if constexpr (m == 3) {
      const int half = g / 4;
      if (g % 4 < 3) return bit_and(shifted(of_three(b, g % 4, v), shift - 3 * half), set1_bytes(7 << shift));
      return merge_bits(shifted(of_three(b, half, v), shift - 6), set1_bytes(3 << shift),
                        shifted(of_three(b, 2, v), shift - 4 - half), set1_bytes(4 << shift));
    }
    const IntVec low_ones = shifted(word<m>(low, b, g, v), shift - g / m * m),
                 mask = set1_bytes(((1 << m) - 1) << shift);
    if constexpr (n > 0) {
      const IntVec bits = word<n>(high, b, g, v);
      return merge_bits(low_ones, mask, shifted(bits, m + shift - g / n * n),
                        set1_bytes(((1 << n) - 1) << (m + shift)));
    } else if constexpr (kFormat.has_table) {
      return look_up(load_table(kIq4), bit_and(low_ones, mask));
    } else {
      return bit_and(low_ones, mask);
    }
  }

  /// Of the block's s-th part.
  Vec scale(int64_t b, int s, int v) const { return part_value<0>(scales, block_scales, b, s, v); }
  Vec minimum(int64_t b, int s, int v) const { return part_value<4>(minima, block_minima, b, s, v); }

  /// Where QuantFormat::scales_integers: the block's scales in lanes of 16 bits, both parts' of a row side by
  /// side; its minima likewise; and what these integers are multiplied by.
  IntVec scale_pairs(int64_t b, int v) const {
    if constexpr (kFormat.scale_bits == 8) return part_bytes<true>(b, v);
    return bit_and(part_bytes<false>(b, v), set1_int(0x000f000f));
  }
  IntVec minimum_pairs(int64_t b, int v) const { return shift_right16(part_bytes<false>(b, v), 4); }
  Vec block_scale(int64_t b, int v) const { return block_value(block_scales, b, v); }
  Vec block_minimum(int64_t b, int v) const { return block_value(block_minima, b, v); }

 private:
  /// The bytes with group g, of a part with kBits bits a value.
  template <int kBits, typename Words = IntVec>
  Words word(const uint8_t* part, int64_t b, int g, int v) const {
    const uint8_t* at = block<kBits>(part, b, v);
    if constexpr (kPanelRun == 4 || kBits == 1) {
      return load_int(at + g % kBits * kGroupBytes);
    } else {
      at += g % kBits / 2 * 2 * kGroupBytes;
      const Words first = load_int(at), second = load_int(at + 4 * kLanes);
      return g % 2 == 0 ? even_lanes(first, second) : odd_lanes(first, second);
    }
  }

  /// A block's i-th word of 3 bits a value: groups i and 4 + i, and two bits more (see PanelMatrix).
  IntVec of_three(int64_t b, int i, int v) const { return load_int(block<3>(low, b, v) + i * kGroupBytes); }

  Vec block_value(const uint8_t* values, int64_t b, int v) const {
    return load_f16(as_16_bits(values + offset(v, 2)) + b / 8 * kPanelRows);
  }

  /// The scales of a block with two parts.
  template <bool kSigned>
  IntVec part_bytes(int64_t b, int v) const {
    const uint8_t* at = scales + offset(v, 1) + b * 2 * kPanelRows;
    return load_pairs<kSigned>(at, at + kPanelRows);
  }

  /// kShift: where 4 bits begin.
  template <int kShift>
  Vec part_value(const uint8_t* values, const uint8_t* block_values, int64_t b, int s, int v) const {
    const int64_t at = (b * kParts + s) * kPanelRows;
    if constexpr (kFormat.scale_bits == 16) {
      return load_f16(as_16_bits(values + offset(v, 2)) + at);
    } else {
      const Vec block = block_value(block_values, b, v);
      IntVec n = load_int8(values + offset(v, 1) + at);
      if constexpr (kFormat.scale_bits == 4) n = bit_and(shift_right(n, kShift), set1_int(15));
      return mul(block, to_float(n));
    }
  }
};

/// Of a block's two parts, whose sums fit 16 bits: the first's times the even scales + the second's, which
/// are 2^kSecond times too large, times the odd ones.
template <int kSecond = 0>
IntVec weighted_sum(IntVec first, IntVec second, IntVec scales) {
  return add_products16(odd_lanes16(first, shift_left(second, 16 - kSecond)), scales);
}

/// Minus kTimes (a power of two) the sums of a block's two parts of activations, in every lane's halves.
template <int kTimes>
IntVec minus_sums(const int32_t* corrections) {
  constexpr int kShift = 7 - std::countr_zero(unsigned{kTimes});
  return odd_lanes16(shift_right(set1_int(corrections[0]), kShift),
                     shift_left(set1_int(corrections[1]), 16 - kShift));
}

}  // namespace
}  // namespace qwen2vl::cpu
