#pragma once

#include <cstring>

#include "base/host_device.h"
#include "quant/block_types.h"

namespace qwen2vl {

/// A block taken apart: value i is scale * value(q[i]) - minimum with the QuantFormat's `value` and, for its
/// part p = i / part,
///   scale = d * scales[p],  minimum = m * minima[p]      where scales have 8 or 4 bits,
///   scale = d,              minimum = m                  where they have 16.
struct OpenBlock {
  uint8_t q[kBlock256];  ///< of 8 bits: two's complement
  uint16_t d, m;         ///< f16
  int8_t scales[kBlock256 / 16];
  int8_t minima[kBlock256 / 16];
};

// Eight bytes at a time: of single ones, which may alias anything, compilers make no vectors.

QWEN2VL_HOST_DEVICE inline uint64_t load_word(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}
QWEN2VL_HOST_DEVICE inline void store_word(uint8_t* p, uint64_t word) { std::memcpy(p, &word, sizeof word); }

inline constexpr uint64_t kOnes = 0x0101010101010101;

/// n low nibbles to q, n high ones to q + n.
QWEN2VL_HOST_DEVICE inline void open_nibbles(const uint8_t* qs, int n, uint8_t* q) {
  for (int i = 0; i < n; i += 8) {
    const uint64_t word = load_word(qs + i);
    store_word(q + i, word & 15 * kOnes);
    store_word(q + n + i, word >> 4 & 15 * kOnes);
  }
}

/// Eight values get bit kBit, 0 or 1 in each byte of `ones`.
template <int kBit>
QWEN2VL_HOST_DEVICE void add_bits(uint64_t ones, uint8_t* q) {
  store_word(q, load_word(q) | ones << kBit);
}

/// Bit p of qh[l] to bit kBit of value 32 * p + l of 256.
template <int kBit>
QWEN2VL_HOST_DEVICE void open_high_bits(const uint8_t (&qh)[kBlock256 / 8], uint8_t* q) {
  for (int p = 0; p < 8; ++p)
    for (int l = 0; l < 32; l += 8) add_bits<kBit>(load_word(qh + l) >> p & kOnes, q + 32 * p + l);
}

/// Two bits of each of 256 values: see Block<Q3_K>.
QWEN2VL_HOST_DEVICE inline void open_twos(const uint8_t (&qs)[kBlock256 / 4], uint8_t* q) {
  for (int v = 0; v < kBlock256; v += 8) {
    const uint64_t word = load_word(qs + v / 128 * 32 + v % 32);
    store_word(q + v, word >> 2 * (v / 32 % 4) & 3 * kOnes);
  }
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q4_0>& block, OpenBlock& out) {
  open_nibbles(block.qs, sizeof block.qs, out.q);
  out.d = block.d;
}

/// Bit i of 32 to bit 4 of value i.
QWEN2VL_HOST_DEVICE inline void open_fifth_bits(const uint8_t (&qh)[kBlock32 / 8], uint8_t* q) {
  for (int i = 0; i < kBlock32 / 8; ++i) {
    const uint64_t bits = qh[i] * kOnes & 0x8040201008040201;  // bit k in byte k
    add_bits<4>((bits + 0x7f * kOnes) >> 7 & kOnes, q + 8 * i);
  }
}

/// An f16's negative.
QWEN2VL_HOST_DEVICE inline uint16_t negated(uint16_t half) { return half ^ 0x8000; }

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q4_1>& block, OpenBlock& out) {
  open_nibbles(block.qs, sizeof block.qs, out.q);
  out.d = block.d;
  out.m = negated(block.m);
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q5_0>& block, OpenBlock& out) {
  open_nibbles(block.qs, sizeof block.qs, out.q);
  open_fifth_bits(block.qh, out.q);
  out.d = block.d;
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q5_1>& block, OpenBlock& out) {
  open_nibbles(block.qs, sizeof block.qs, out.q);
  open_fifth_bits(block.qh, out.q);
  out.d = block.d;
  out.m = negated(block.m);
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q8_0>& block, OpenBlock& out) {
  std::memcpy(out.q, block.qs, sizeof block.qs);
  out.d = block.d;
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q2_K>& block, OpenBlock& out) {
  for (int p = 0; p < 16; ++p) {
    out.scales[p] = block.scales[p] & 15;
    out.minima[p] = static_cast<int8_t>(block.scales[p] >> 4);
  }
  open_twos(block.qs, out.q);
  out.d = block.d;
  out.m = block.m;
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q3_K>& block, OpenBlock& out) {
  for (int p = 0; p < 16; ++p) {
    const int low = block.scales[p % 8] >> 4 * (p / 8) & 15,
              high = block.scales[8 + p % 4] >> 2 * (p / 4) & 3;
    out.scales[p] = static_cast<int8_t>((low | high << 4) - 32);
  }
  open_twos(block.qs, out.q);
  open_high_bits<2>(block.hmask, out.q);
  out.d = block.d;
}

/// What Q4_K and Q5_K have in common: scales, minima and low bits.
template <typename K>
QWEN2VL_HOST_DEVICE void open_k_block(const K& block, OpenBlock& out) {
  for (int p = 0; p < 4; ++p) {
    const uint8_t scale = block.scales[p], minimum = block.scales[4 + p], low = block.scales[8 + p];
    out.scales[p] = scale & 63;
    out.minima[p] = minimum & 63;
    out.scales[4 + p] = static_cast<int8_t>((low & 15) | scale >> 6 << 4);
    out.minima[4 + p] = static_cast<int8_t>(low >> 4 | minimum >> 6 << 4);
  }
  for (int j = 0; j < 4; ++j) open_nibbles(block.qs + 32 * j, 32, out.q + 64 * j);
  out.d = block.d;
  out.m = block.m;
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q4_K>& block, OpenBlock& out) {
  open_k_block(block, out);
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q5_K>& block, OpenBlock& out) {
  open_k_block(block, out);
  open_high_bits<4>(block.qh, out.q);
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::Q6_K>& block, OpenBlock& out) {
  for (int half = 0; half < 2; ++half) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      const uint8_t *low = block.ql + 64 * half + 32 * (quarter % 2), *high = block.qh + 32 * half;
      uint8_t* q = out.q + 128 * half + 32 * quarter;
      for (int l = 0; l < 32; ++l)
        q[l] = static_cast<uint8_t>((low[l] >> (quarter < 2 ? 0 : 4) & 15) | (high[l] >> (2 * quarter) & 3)
                                                                                 << 4);
    }
  }
  std::memcpy(out.scales, block.scales, sizeof block.scales);
  out.d = block.d;
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::IQ4_NL>& block, OpenBlock& out) {
  open_nibbles(block.qs, sizeof block.qs, out.q);
  out.d = block.d;
}

QWEN2VL_HOST_DEVICE inline void open_block(const Block<DType::IQ4_XS>& block, OpenBlock& out) {
  for (int p = 0; p < 8; ++p) {
    const int low = block.scales_l[p / 2] >> 4 * (p % 2) & 15, high = block.scales_h >> 2 * p & 3;
    out.scales[p] = static_cast<int8_t>((low | high << 4) - 32);
    open_nibbles(block.qs + 16 * p, 16, out.q + 32 * p);
  }
  out.d = block.d;
}

/// The block at `bytes`, which need not be aligned.
template <DType T>
QWEN2VL_HOST_DEVICE void open_block_at(const uint8_t* bytes, OpenBlock& out) {
  Block<T> block;
  std::memcpy(&block, bytes, sizeof block);
  open_block(block, out);
}

}  // namespace qwen2vl
