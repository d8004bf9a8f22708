#pragma once

// What becomes of a product: a kernel that multiplies hands every row's pairs (a, b) of output features to one of
// these, so that nothing between two matrix products needs a launch of its own.

#include "cuda/chip.h"

namespace qwen2vl::cuda {

/// A row of a batch: where it stands, and what stands in it.
struct RowInfo {
  uint8_t* const* pages = nullptr;   ///< of its sequence
  const float* embedding = nullptr;  ///< [hidden_size] in place of the token's own, or null
  int32_t token = 0;
  int32_t cell = 0;  ///< its own; it attends to this many before it, and itself
  int32_t position[3] = {0, 0, 0};
};

inline constexpr int kPageCells = 64;

/// A page of the cache: [layer][keys, values][key-value head][kPageCells][head_dim], f16 (float32 in exact).
struct PageLayout {
  int32_t kv_heads = 0;
  int32_t head_dim = 0;  ///< padded with zeros
  CHIP_HOST_DEVICE int64_t panel(int layer, int value, int head) const {
    return ((static_cast<int64_t>(layer) * 2 + value) * kv_heads + head) * kPageCells * head_dim;
  }
};

enum class Finish : int32_t { Store, StoreBf16, Residual, SwiGlu, QuickGelu, Gelu, TextQkv, VisionQkv };

struct Epilogue {
  const float2* bias = nullptr;  ///< [pairs], or null
  float* out = nullptr;          ///< Store, Residual: [rows][stride]
  uint16_t* half_out = nullptr;  ///< the others
  int64_t stride = 0;
  int32_t columns = 0;  ///< features that there are (Store, StoreBf16, Residual, gelus); pairs (SwiGlu)
  // TextQkv and VisionQkv. Pair p: head p / pairs_per_head of queries, keys, values; dimensions i and half + i.
  int32_t pairs_per_head = 0, half = 0, heads = 0, head_dim = 0;
  float query_scale = 0;
  const float* rotation = nullptr;  ///< [rows][cos: half | sin: half]
  // TextQkv: half_out is the queries [rows][heads][head_dim]
  const RowInfo* rows = nullptr;
  PageLayout pages;
  int32_t layer = 0;
  // VisionQkv: half_out is [queries, keys, values][heads][half_rows][head_dim]; with a transposed_stride, values are
  // [heads][head_dim][transposed_stride]
  int64_t half_rows = 0;
  int64_t transposed_stride = 0;
};

CHIP_DEVICE void store_half(uint16_t* to, float value) { *to = static_cast<uint16_t>(pack_f16(value, 0.0f)); }

CHIP_DEVICE float silu(float x) { return x / (1.0f + __expf(-x)); }

CHIP_DEVICE float2 rotate(float2 v, float cos, float sin) {
  return make_float2(v.x * cos - v.y * sin, v.y * cos + v.x * sin);
}

/// What finishing a pair reads, apart: it can be on its way while the product is computed.
struct Place {
  float2 bias = {0, 0};
  float2 old = {0, 0};          ///< Residual: what is there
  float cos = 0, sin = 0;       ///< the rotation of a pair of dimensions
  uint16_t* cell = nullptr;     ///< TextQkv, keys and values: the head's dimensions in the cache
};

template <Finish finish>
CHIP_DEVICE Place prepare(const Epilogue& e, int64_t row, int pair) {
  Place place;
  if (e.bias != nullptr) place.bias = e.bias[pair];
  if constexpr (finish == Finish::Residual) {
    const float* from = e.out + row * e.stride + 2 * pair;
    if (2 * pair + 1 < e.columns && e.stride % 2 == 0)
      place.old = *reinterpret_cast<const float2*>(from);
    else
      place.old = make_float2(2 * pair < e.columns ? from[0] : 0.0f, 2 * pair + 1 < e.columns ? from[1] : 0.0f);
  }
  if constexpr (finish == Finish::TextQkv || finish == Finish::VisionQkv) {
    const int head = pair / e.pairs_per_head, i = pair % e.pairs_per_head;
    if (i >= e.half) return place;
    place.cos = e.rotation[row * 2 * e.half + i];
    place.sin = e.rotation[row * 2 * e.half + e.half + i];
    if constexpr (finish == Finish::TextQkv) {
      const int key_head = head - e.heads, value_head = key_head - e.pages.kv_heads;
      if (key_head < 0 || value_head >= e.pages.kv_heads) return place;
      const RowInfo& info = e.rows[row];
      uint16_t* page = reinterpret_cast<uint16_t*>(info.pages[info.cell / kPageCells]);
      place.cell = page + e.pages.panel(e.layer, value_head >= 0, value_head >= 0 ? value_head : key_head) +
                   static_cast<int64_t>(info.cell % kPageCells) * e.head_dim;
    }
  }
  return place;
}

/// Pair `pair` of row `row` is v.
template <Finish finish>
CHIP_DEVICE void apply(const Epilogue& e, int64_t row, int pair, float2 v, const Place& place) {
  v.x += place.bias.x;
  v.y += place.bias.y;
  const int column = 2 * pair;
  if constexpr (finish == Finish::Store) {
    float* to = e.out + row * e.stride + column;
    if (column < e.columns) to[0] = v.x;
    if (column + 1 < e.columns) to[1] = v.y;
  } else if constexpr (finish == Finish::Residual) {
    float* to = e.out + row * e.stride + column;
    v = make_float2(place.old.x + v.x, place.old.y + v.y);
    if (column + 1 < e.columns && e.stride % 2 == 0) {
      *reinterpret_cast<float2*>(to) = v;
    } else {
      if (column < e.columns) to[0] = v.x;
      if (column + 1 < e.columns) to[1] = v.y;
    }
  } else if constexpr (finish == Finish::SwiGlu) {
    if (pair < e.columns)
      e.half_out[row * e.stride + pair] = static_cast<uint16_t>(pack_bf16(silu(v.x) * v.y, 0.0f));
  } else if constexpr (finish == Finish::QuickGelu || finish == Finish::Gelu || finish == Finish::StoreBf16) {
    if constexpr (finish == Finish::QuickGelu)
      v = make_float2(v.x / (1.0f + __expf(-1.702f * v.x)), v.y / (1.0f + __expf(-1.702f * v.y)));
    if constexpr (finish == Finish::Gelu)
      v = make_float2(0.5f * v.x * (1.0f + erff(v.x * 0.70710678f)), 0.5f * v.y * (1.0f + erff(v.y * 0.70710678f)));
    if (column + 1 >= e.columns) v.y = 0;  // the stride is even: what is beyond the columns stays zero
    if (column < e.columns)
      *reinterpret_cast<uint32_t*>(e.half_out + row * e.stride + column) = pack_bf16(v.x, v.y);
  } else {
    const int head = pair / e.pairs_per_head, i = pair % e.pairs_per_head;
    if (i >= e.half) return;
    if constexpr (finish == Finish::TextQkv) {
      const int value_head = head - e.heads - e.pages.kv_heads;
      if (value_head >= e.pages.kv_heads) return;
      if (value_head < 0) v = rotate(v, place.cos, place.sin);
      uint16_t* to = place.cell;
      if (head < e.heads) {
        v = make_float2(v.x * e.query_scale, v.y * e.query_scale);
        to = e.half_out + (row * e.heads + head) * e.head_dim;
      }
      store_half(to + i, v.x);
      store_half(to + e.half + i, v.y);
    } else {
      const int part = head / e.heads;
      if (part > 2) return;
      if (part < 2) v = rotate(v, place.cos, place.sin);
      if (part == 0) v = make_float2(v.x * e.query_scale, v.y * e.query_scale);
      uint16_t* to = e.half_out + (static_cast<int64_t>(head) * e.half_rows + row) * e.head_dim;
      if (part == 2 && e.transposed_stride > 0) {
        to = e.half_out + 2 * e.heads * e.half_rows * e.head_dim +
             (static_cast<int64_t>(head - 2 * e.heads) * e.head_dim + i) * e.transposed_stride + row;
        store_half(to, v.x);
        return store_half(to + e.half * e.transposed_stride, v.y);
      }
      store_half(to + i, v.x);
      store_half(to + e.half + i, v.y);
    }
  }
}

template <Finish finish>
CHIP_DEVICE void apply(const Epilogue& e, int64_t row, int pair, float2 v) {
  apply<finish>(e, row, pair, v, prepare<finish>(e, row, pair));
}

}  // namespace qwen2vl::cuda
