#include "cpu/kv_cache.h"

#include <cstring>
#include <stdexcept>

#include "base/half.h"

namespace qwen2vl::cpu {

PagedKvCache::PagedKvCache(const TextConfig& config, Precision precision)
    : heads_(config.num_key_value_heads),
      head_dim_(config.head_dim),
      element_bytes_(precision == Precision::Exact ? 4 : 2) {
  const int64_t value_panels = (head_dim_ + kPanelRows - 1) / kPanelRows;
  key_bytes_ = kPageCells * head_dim_ * element_bytes_;
  head_bytes_ = key_bytes_ + kPageCells * value_panels * kPanelRows * element_bytes_;
  layer_bytes_ = heads_ * head_bytes_;
  page_bytes_ = config.num_hidden_layers * layer_bytes_;
}

void PagedKvCache::truncate(int64_t size) {
  if (size < 0 || size > size_)
    throw std::invalid_argument("cannot truncate a cache to more cells than it has");
  size_ = size;
  pages_.resize((size + kPageCells - 1) / kPageCells);
}

void PagedKvCache::reserve(int64_t cells) {
  const size_t pages = static_cast<size_t>((size_ + cells + kPageCells - 1) / kPageCells);
  while (pages_.size() < pages) {
    AlignedBuffer page(page_bytes_);
    std::memset(page.data(), 0, page_bytes_);  // kernels read whole panels; what they read must be a number
    pages_.push_back(std::move(page));
  }
}

const uint8_t* PagedKvCache::keys(int64_t page, int64_t layer, int64_t head) const {
  return pages_[page].data() + layer * layer_bytes_ + head * head_bytes_;
}

const uint8_t* PagedKvCache::values(int64_t page, int64_t layer, int64_t head) const {
  return keys(page, layer, head) + key_bytes_;
}

void PagedKvCache::write(int64_t layer, int64_t cell, const float* k, const float* v) {
  const int64_t slot = cell % kPageCells;
  const auto store = [&](auto* keys, auto* values, auto convert) {
    keys += (slot / kPanelRows) * key_panel_elements() + slot % kPanelRows;
    values += slot * kPanelRows;
    for (int64_t d = 0; d < head_dim_; ++d) {
      keys[d * kPanelRows] = convert(k[d]);
      values[(d / kPanelRows) * value_panel_elements() + d % kPanelRows] = convert(v[d]);
    }
  };
  for (int64_t head = 0; head < heads_; ++head, k += head_dim_, v += head_dim_) {
    uint8_t* keys = pages_[cell / kPageCells].data() + layer * layer_bytes_ + head * head_bytes_;
    uint8_t* values = keys + key_bytes_;
    if (half())
      store(reinterpret_cast<uint16_t*>(keys), reinterpret_cast<uint16_t*>(values), f32_to_f16);
    else
      store(reinterpret_cast<float*>(keys), reinterpret_cast<float*>(values), [](float x) { return x; });
  }
}

}  // namespace qwen2vl::cpu
