// Blocks of 32 values with scales of 16 bits.

#include "base/half.h"
#include "quant/quantize_blocks.h"
#include "quant/search.h"

namespace qwen2vl {
namespace {

static_assert(kGroup == kLanes);

using Blocks = Parts<kBlock32>;
using Levels32 = Quad[kBlock32];

Blocks load(const BlockGroup& group, float largest) {
  Blocks blocks;
  for (int k = 0; k < kLanes; ++k) blocks.load(k, group.x[k], group.w[k], largest);
  return blocks;
}

/// `q` are integers of 0 to 15 or, where the block has them, of five bits.
template <typename B>
void pack(const Levels32& q, B* out) {
  constexpr int kHalf = kBlock32 / 2;
  for (int k = 0; k < kLanes; ++k) {
    uint32_t fifth = 0;
    for (int i = 0; i < kHalf; ++i) {
      const auto low = static_cast<uint32_t>(q[i][k]);
      const auto high = static_cast<uint32_t>(q[i + kHalf][k]);
      out[k].qs[i] = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
      fifth |= low >> 4 << i | high >> 4 << (i + kHalf);
    }
    if constexpr (requires { out->qh; })
      for (int i = 0; i < 4; ++i) out[k].qh[i] = static_cast<uint8_t>(fifth >> 8 * i);
  }
}

/// The nearest float16; what is too large is cut.
uint16_t to_f16(float value) { return f32_to_f16(std::min(std::max(value, -kMaxF16), kMaxF16)); }

/// Levels without a minimum, `largest` of them in magnitude, written as index(level).
template <typename Levels, typename Index, typename B>
void quantize_scaled(const BlockGroup& group, float largest, const Targets& targets, const Index& index,
                     B* out) {
  const Blocks blocks = load(group, kMaxF16 * largest);
  Quad scale = search_scales<Levels>(blocks, targets);
  for (int k = 0; k < kLanes; ++k) {
    out[k].d = to_f16(scale[k]);
    scale[k] = f16_to_f32(out[k].d);
  }
  Levels32 q;
  choose_levels<Levels>(blocks, inverse(scale), all(0), q);
  for (Quad& level : q) level = index(level);
  pack(q, out);
}

/// Levels -kOffset to kOffset - 1, written with kOffset added.
template <int kOffset, typename B>
void quantize_integers(const BlockGroup& group, const Targets& targets, B* out) {
  quantize_scaled<Integers<-kOffset, kOffset - 1>>(
      group, kOffset, targets, [](Quad level) { return level + all(kOffset); }, out);
}

/// Levels 0 to kHigh, and a minimum.
template <int kHigh, typename B>
void quantize_lines(const BlockGroup& group, B* out) {
  const Blocks blocks = load(group, kMaxF16);
  Lines lines = search_lines<kHigh, Minimum::kAny>(blocks);
  const ValueSums sums = value_sums(blocks);
  for (int k = 0; k < kLanes; ++k) {
    out[k].d = to_f16(lines.scale[k]);
    out[k].m = to_f16(out[k].d == 0 ? sums.wx[k] / sums.w[k] : -lines.minimum[k]);
    lines.scale[k] = f16_to_f32(out[k].d);
    lines.minimum[k] = -f16_to_f32(out[k].m);
  }
  const Quad inverted = inverse(lines.scale);
  Levels32 q;
  choose_levels<Integers<0, kHigh>>(blocks, inverted, lines.minimum * inverted, q);
  pack(q, out);
}

}  // namespace

void quantize_blocks(const BlockGroup& group, Block<DType::Q4_0>* out) {
  quantize_integers<8>(group, {-9.0f, -6.0f, 0.25f, 2}, out);
}

void quantize_blocks(const BlockGroup& group, Block<DType::Q4_1>* out) { quantize_lines<15>(group, out); }

void quantize_blocks(const BlockGroup& group, Block<DType::Q5_0>* out) {
  quantize_integers<16>(group, {-17.0f, -13.0f, 0.25f, 2}, out);
}

void quantize_blocks(const BlockGroup& group, Block<DType::Q5_1>* out) { quantize_lines<31>(group, out); }

void quantize_blocks(const BlockGroup& group, Block<DType::IQ4_NL>* out) {
  const auto index = [](Quad level) {
    for (int k = 0; k < kLanes; ++k) level[k] = static_cast<float>(Iq4Levels::index(level[k]));
    return level;
  };
  quantize_scaled<Iq4Levels>(group, -Iq4Levels::kFirst, kIq4Targets, index, out);
}

}  // namespace qwen2vl
