#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace qwen2vl {

/// Tensor element types, numbered as GGUF numbers them (ggml_type). quant/formats.h lists what they are.
enum class DType : uint32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ4_NL = 20,
  IQ4_XS = 23,
  BF16 = 30,
};

/// IQ4's values, denser around 0.
inline constexpr int8_t kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/// What a quantized value is: x = scale * value(q) - minimum, with integers q of low_bits + high_bits.
struct QuantFormat {
  int low_bits = 0;   ///< 2, 3 or 4: unsigned; 8: signed; 0: the type is not quantized
  int high_bits = 0;  ///< stored apart from the low ones
  int offset = 0;
  int part = 32;        ///< values that share a scale (and a minimum): 32 or 16
  int scale_bits = 16;  ///< of a part's scale. 16: an f16; 8: an integer, multiplied by the block's f16; 4:
                        ///< the same, unsigned, the minimum's above it in its byte
  bool has_minimum = false;  ///< stored as scales are; the offset is 0
  bool has_table = false;    ///< of 4 bits: q stands for kIq4[q]

  constexpr int bits() const { return low_bits + high_bits; }
  /// Whether a block's products are multiplied by its parts' scales, and its activations' sums by their
  /// minima, in integers: a part's products with 8-bit activations fit 16 bits, and two parts make a block
  /// of 32.
  constexpr bool scales_integers() const {
    const int largest = offset == 0 ? (1 << bits()) - 1 : offset;
    return scale_bits < 16 && part == 16 && part * 127 * largest <= INT16_MAX;
  }
  /// What is multiplied are signed bytes; else unsigned ones, less the offset.
  constexpr bool is_signed() const { return bits() == 8 || has_table; }
  constexpr int value(int q) const {
    return has_table ? kIq4[q] : bits() == 8 ? static_cast<int8_t>(q) : q - offset;
  }
};

/// How a type is stored: `block_elements` consecutive values of a row take `block_bytes` bytes.
struct DTypeTraits {
  DType type;
  std::string_view name;  ///< as GGUF tools print it: "F32", "Q4_0", ...
  int64_t block_elements;
  int64_t block_bytes;
  QuantFormat format = {};
  bool is_written = true;  ///< whether quantize_rows has it
};

/// The traits of a GGUF type number, or nullptr for a type that this project does not read.
const DTypeTraits* find_dtype(uint32_t gguf_type);

/// The traits of a type by name (any case), or nullptr.
const DTypeTraits* find_dtype(std::string_view name);

/// Every type's name, for messages: "F32, F16, ...".
std::string dtype_names();
/// Of those that are written.
std::string written_dtype_names();

const DTypeTraits& dtype_traits(DType type);

/// Whether values come in blocks with a scale.
bool is_quantized(DType type);

/// Bytes of one row of `cols` values. Throws std::invalid_argument where the blocks do not divide the row.
int64_t row_bytes(DType type, int64_t cols);

inline constexpr int64_t kBlock32 = 32;    ///< values per block of the types without _K
inline constexpr int64_t kBlock256 = 256;  ///< values per K-quant super-block

/// A quantized type's block as a file has it. All d and m are f16.
template <DType>
struct Block;

/// x[i] = d * (q[i] - 8), q in 0..15. Low nibbles hold values 0..15, high nibbles values 16..31.
template <>
struct Block<DType::Q4_0> {
  uint16_t d;
  uint8_t qs[kBlock32 / 2];
};

/// x[i] = d * q[i] + m, q as Q4_0's.
template <>
struct Block<DType::Q4_1> {
  uint16_t d, m;
  uint8_t qs[kBlock32 / 2];
};

/// x[i] = d * (q[i] - 16), q in 0..31: the low bits as Q4_0's q, the high one of value i is bit i of qh.
template <>
struct Block<DType::Q5_0> {
  uint16_t d;
  uint8_t qh[kBlock32 / 8];
  uint8_t qs[kBlock32 / 2];
};

/// x[i] = d * q[i] + m, q as Q5_0's.
template <>
struct Block<DType::Q5_1> {
  uint16_t d, m;
  uint8_t qh[kBlock32 / 8];
  uint8_t qs[kBlock32 / 2];
};

/// x[i] = d * q[i], q in -127..127 as written here (-128 is accepted).
template <>
struct Block<DType::Q8_0> {
  uint16_t d;
  int8_t qs[kBlock32];
};

/// x[i] = d * (scales[i / 16] & 15) * q[i] - m * (scales[i / 16] >> 4), q in 0..3 as Q3_K's low bits.
template <>
struct Block<DType::Q2_K> {
  uint8_t scales[kBlock256 / 16];
  uint8_t qs[kBlock256 / 4];
  uint16_t d, m;
};

/// x[i] = d * (scale[i / 16] - 32) * (q[i] - 4), q in 0..7. Bits 2 j and 2 j + 1 of qs[32 * half + l] are the
/// low bits of value v = 128 * half + 32 * j + l, bit v / 32 of hmask[l] its high one. Scales have 6 bits:
/// the low four of part p are nibble p / 8 of scales[p % 8], the others bits from 2 * (p / 4) on of scales[8
/// + p % 4].
template <>
struct Block<DType::Q3_K> {
  uint8_t hmask[kBlock256 / 8];
  uint8_t qs[kBlock256 / 4];
  uint8_t scales[12];
  uint16_t d;
};

/// x[i] = d * scale[i / 32] * q[i] - m * minimum[i / 32], q in 0..15. qs[32 * j + l]: low nibble of value
/// 64 * j + l, high nibble of value 64 * j + 32 + l. Scales and minima have 6 bits: those of the first four
/// parts are the low bits of scales[0..4) and scales[4..8); of the others scales[8..12) has the low four bits
/// (scale in the low nibble), and the two high bits stand above those of part p - 4.
template <>
struct Block<DType::Q4_K> {
  uint16_t d, m;
  uint8_t scales[12];
  uint8_t qs[kBlock256 / 2];
};

/// The same with q in 0..31: bit p of qh[l] is the high bit of value 32 * p + l.
template <>
struct Block<DType::Q5_K> {
  uint16_t d, m;
  uint8_t scales[12];
  uint8_t qh[kBlock256 / 8];
  uint8_t qs[kBlock256 / 2];
};

/// x[i] = d * scales[i / 16] * (q[i] - 32), q in 0..63. For each half (128 values) and l in 0..31:
/// ql[64 * half + l]      low nibble: low bits of value l,      high nibble: of value l + 64;
/// ql[64 * half + 32 + l] low nibble: low bits of value l + 32, high nibble: of value l + 96;
/// qh[32 * half + l]      bits 0-1, 2-3, 4-5, 6-7: high bits of values l, l + 32, l + 64, l + 96.
template <>
struct Block<DType::Q6_K> {
  uint8_t ql[kBlock256 / 2];
  uint8_t qh[kBlock256 / 4];
  int8_t scales[kBlock256 / 16];
  uint16_t d;
};

/// x[i] = d * kIq4[q[i]], q as Q4_0's.
template <>
struct Block<DType::IQ4_NL> {
  uint16_t d;
  uint8_t qs[kBlock32 / 2];
};

/// x[i] = d * (scale[i / 32] - 32) * kIq4[q[i]], every 32 values of q as Q4_0's. Scales have 6 bits: of
/// part p the low four are nibble p of scales_l, the others bits 2 p and 2 p + 1 of scales_h.
template <>
struct Block<DType::IQ4_XS> {
  uint16_t d;
  uint16_t scales_h;
  uint8_t scales_l[kBlock256 / 64];
  uint8_t qs[kBlock256 / 2];
};

}  // namespace qwen2vl
