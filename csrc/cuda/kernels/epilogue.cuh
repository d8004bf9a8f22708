#pragma once

// What becomes of a product: a kernel that multiplies hands every row's pairs (a, b) of output features to
// one of these, so that nothing between two matrix products needs a launch of its own.

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
  // TextQkv and VisionQkv. Pair p: head p / pairs_per_head of queries, keys, values; dimensions i and half +
  // i.
  int32_t pairs_per_head = 0, half = 0, heads = 0, head_dim = 0;
  float query_scale = 0;
  const float* rotation = nullptr;  ///< [rows][cos: half | sin: half]
  // TextQkv: half_out is the queries [rows][heads][head_dim]
  const RowInfo* rows = nullptr;
  PageLayout pages;
  int32_t layer = 0;
  // VisionQkv: half_out is [queries, keys, values][heads][half_rows][head_dim]; with a transposed_stride,
  // values are [heads][head_dim][transposed_stride]
  int64_t half_rows = 0;
  int64_t transposed_stride = 0;
};

CHIP_DEVICE void store_half(uint16_t* to, float value) { *to = static_cast<uint16_t>(pack_f16(value, 0.0f)); }

CHIP_DEVICE float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

CHIP_DEVICE float2 rotate(float2 v, float cos, float sin) {
  return make_float2(v.x * cos - v.y * sin, v.y * cos + v.x * sin);
}

/// What finishing the pairs of a row needs of the row.
struct RowPlace {
  int64_t row = 0;
  float* out = nullptr;  ///< its first column, or
  uint16_t* half_out = nullptr;
  const float* turn = nullptr;  ///< its rotation
  uint16_t* page = nullptr;     ///< TextQkv: of the cache, with its cell's offset within a head
};

/// Where a pair of dimensions is.
struct HeadPlace {
  int head = 0, i = 0;
};
CHIP_DEVICE HeadPlace head_place(const Epilogue& e, int pair) {
  if (e.pairs_per_head == 0) return {};
  return {pair / e.pairs_per_head, pair % e.pairs_per_head};
}
/// Of the pair that is so many further, no more than a head.
CHIP_DEVICE HeadPlace further(const Epilogue& e, HeadPlace at, int pairs) {
  at.i += pairs;
  if (at.i >= e.pairs_per_head) {
    at.i -= e.pairs_per_head;
    ++at.head;
  }
  return at;
}

template <Finish finish>
CHIP_DEVICE RowPlace row_place(const Epilogue& e, int64_t row,
                               uint16_t* page = nullptr) {  // page: where it is known
  RowPlace place;
  place.row = row;
  if constexpr (finish == Finish::Store || finish == Finish::Residual) place.out = e.out + row * e.stride;
  if constexpr (finish == Finish::SwiGlu || finish == Finish::QuickGelu || finish == Finish::Gelu ||
                finish == Finish::StoreBf16)
    place.half_out = e.half_out + row * e.stride;
  if constexpr (finish == Finish::TextQkv || finish == Finish::VisionQkv)
    place.turn = e.rotation + row * 2 * e.half;
  if constexpr (finish == Finish::TextQkv) {
    place.page = page;
    if (page != nullptr) return place;
    const RowInfo& info = e.rows[row];
    place.page = reinterpret_cast<uint16_t*>(info.pages[info.cell / kPageCells]) +
                 static_cast<int64_t>(info.cell % kPageCells) * e.head_dim;
  }
  return place;
}

/// What a product is added to: the bias, and what is there already.
template <Finish finish>
CHIP_DEVICE float2 start(const Epilogue& e, const RowPlace& place, int pair) {
  float2 v = e.bias != nullptr ? e.bias[pair] : make_float2(0.0f, 0.0f);
  if constexpr (finish == Finish::Residual) {
    const float* from = place.out + 2 * pair;
    if (2 * pair < e.columns) v.x += from[0];
    if (2 * pair + 1 < e.columns) v.y += from[1];
  }
  return v;
}

/// Cosine and sine of a pair of dimensions.
template <Finish finish>
CHIP_DEVICE float2 rotation_of(const Epilogue& e, const RowPlace& place, HeadPlace at) {
  if constexpr (finish == Finish::TextQkv || finish == Finish::VisionQkv) {
    if (at.i < e.half) return make_float2(place.turn[at.i], place.turn[e.half + at.i]);
  }
  return make_float2(1.0f, 0.0f);
}

CHIP_DEVICE float quick_gelu(float x) { return __fdividef(x, 1.0f + __expf(-1.702f * x)); }
CHIP_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

/// A head's dimensions of a row, for queries, keys and values; null for what fills heads up.
template <Finish finish>
CHIP_DEVICE uint16_t* head_of(const Epilogue& e, const RowPlace& place, int head) {
  if constexpr (finish == Finish::TextQkv) {
    if (head < e.heads) return e.half_out + (place.row * e.heads + head) * e.head_dim;
    const int key_head = head - e.heads, value_head = key_head - e.pages.kv_heads;
    if (value_head >= e.pages.kv_heads) return nullptr;
    return place.page + e.pages.panel(e.layer, value_head >= 0, value_head >= 0 ? value_head : key_head);
  } else {
    if (head >= 3 * e.heads) return nullptr;
    return e.half_out + (static_cast<int64_t>(head) * e.half_rows + place.row) * e.head_dim;
  }
}

/// Heads of queries, and those that turn.
template <Finish finish>
CHIP_DEVICE float2 turned(const Epilogue& e, int head, float2 v, float2 rotation) {
  if (head < e.heads + (finish == Finish::TextQkv ? e.pages.kv_heads : e.heads))
    v = rotate(v, rotation.x, rotation.y);
  return head < e.heads ? make_float2(v.x * e.query_scale, v.y * e.query_scale) : v;
}

/// Values of a head of the vision tower, a row after another in memory.
CHIP_DEVICE void store_transposed(const Epilogue& e, int64_t row, int head, int i, float2 v) {
  uint16_t* to = e.half_out + 2 * e.heads * e.half_rows * e.head_dim +
                 (static_cast<int64_t>(head - 2 * e.heads) * e.head_dim + i) * e.transposed_stride + row;
  store_half(to, v.x);
  store_half(to + e.half * e.transposed_stride, v.y);
}

/// Pair `pair` of a row is v; bias and what was there are in it.
template <Finish finish>
CHIP_DEVICE void apply(const Epilogue& e, const RowPlace& place, int pair, HeadPlace at, float2 v,
                       float2 rotation) {
  const int column = 2 * pair;
  if constexpr (finish == Finish::Store || finish == Finish::Residual) {
    float* to = place.out + column;
    if (column < e.columns) to[0] = v.x;
    if (column + 1 < e.columns) to[1] = v.y;
  } else if constexpr (finish == Finish::SwiGlu) {
    if (pair < e.columns) place.half_out[pair] = static_cast<uint16_t>(pack_bf16(silu(v.x) * v.y, 0.0f));
  } else if constexpr (finish == Finish::QuickGelu || finish == Finish::Gelu || finish == Finish::StoreBf16) {
    if constexpr (finish == Finish::QuickGelu) v = make_float2(quick_gelu(v.x), quick_gelu(v.y));
    if constexpr (finish == Finish::Gelu) v = make_float2(gelu(v.x), gelu(v.y));
    if (column + 1 >= e.columns) v.y = 0;  // the stride is even: what is beyond the columns stays zero
    if (column < e.columns) *reinterpret_cast<uint32_t*>(place.half_out + column) = pack_bf16(v.x, v.y);
  } else {
    const int head = at.head, i = at.i;
    uint16_t* to = head_of<finish>(e, place, head);
    if (i >= e.half || to == nullptr) return;
    v = turned<finish>(e, head, v, rotation);
    if (finish == Finish::VisionQkv && e.transposed_stride > 0 && head >= 2 * e.heads)
      return store_transposed(e, place.row, head, i, v);
    store_half(to + i, v.x);
    store_half(to + e.half + i, v.y);
  }
}

// Two pairs at once, p (even) and p + 1, where e.wide says that they lie well: wider loads and stores.

CHIP_HOST_DEVICE bool lies_well(Finish finish, const Epilogue& e) {
  switch (finish) {
    case Finish::Store:
    case Finish::Residual:
    case Finish::StoreBf16:
    case Finish::QuickGelu:
    case Finish::Gelu:
      return e.stride % 4 == 0 && e.columns % 4 == 0;
    case Finish::SwiGlu:
      return e.stride % 2 == 0 && e.columns % 2 == 0;
    case Finish::TextQkv:
    case Finish::VisionQkv:
      return e.half % 2 == 0;
  }
  return false;
}

template <Finish finish>
CHIP_DEVICE float4 start_both(const Epilogue& e, const RowPlace& place, int pair) {
  float4 v = e.bias != nullptr ? *reinterpret_cast<const float4*>(e.bias + pair)
                               : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if constexpr (finish == Finish::Residual)
    if (2 * pair < e.columns) {
      const float4 old = *reinterpret_cast<const float4*>(place.out + 2 * pair);
      v = make_float4(v.x + old.x, v.y + old.y, v.z + old.z, v.w + old.w);
    }
  return v;
}

/// cosines of both, then sines.
template <Finish finish>
CHIP_DEVICE float4 rotation_of_both(const Epilogue& e, const RowPlace& place, HeadPlace at) {
  if constexpr (finish == Finish::TextQkv || finish == Finish::VisionQkv) {
    const int i = at.i;
    if (i < e.half) {
      const float2 cos = *reinterpret_cast<const float2*>(place.turn + i);
      const float2 sin = *reinterpret_cast<const float2*>(place.turn + e.half + i);
      return make_float4(cos.x, cos.y, sin.x, sin.y);
    }
  }
  return make_float4(1.0f, 1.0f, 0.0f, 0.0f);
}

template <Finish finish>
CHIP_DEVICE void apply_both(const Epilogue& e, const RowPlace& place, int pair, HeadPlace at, float4 v,
                            float4 rotation) {
  const int column = 2 * pair;
  if constexpr (finish == Finish::Store || finish == Finish::Residual) {
    if (column < e.columns) *reinterpret_cast<float4*>(place.out + column) = v;
  } else if constexpr (finish == Finish::SwiGlu) {
    if (pair < e.columns)
      *reinterpret_cast<uint32_t*>(place.half_out + pair) = pack_bf16(silu(v.x) * v.y, silu(v.z) * v.w);
  } else if constexpr (finish == Finish::QuickGelu || finish == Finish::Gelu || finish == Finish::StoreBf16) {
    if constexpr (finish == Finish::QuickGelu)
      v = make_float4(quick_gelu(v.x), quick_gelu(v.y), quick_gelu(v.z), quick_gelu(v.w));
    if constexpr (finish == Finish::Gelu) v = make_float4(gelu(v.x), gelu(v.y), gelu(v.z), gelu(v.w));
    if (column < e.columns)
      *reinterpret_cast<uint2*>(place.half_out + column) =
          make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
  } else {
    const int head = at.head, i = at.i;
    uint16_t* to = head_of<finish>(e, place, head);
    if (i >= e.half || to == nullptr) return;
    const float2 a = turned<finish>(e, head, make_float2(v.x, v.y), make_float2(rotation.x, rotation.z));
    const float2 b = turned<finish>(e, head, make_float2(v.z, v.w), make_float2(rotation.y, rotation.w));
    if (finish == Finish::VisionQkv && e.transposed_stride > 0 && head >= 2 * e.heads) {
      store_transposed(e, place.row, head, i, a);
      return store_transposed(e, place.row, head, i + 1, b);
    }
    *reinterpret_cast<uint32_t*>(to + i) = pack_f16(a.x, b.x);
    *reinterpret_cast<uint32_t*>(to + e.half + i) = pack_f16(a.y, b.y);
  }
}

}  // namespace qwen2vl::cuda
