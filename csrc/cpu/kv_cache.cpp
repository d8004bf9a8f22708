#include "cpu/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "base/half.h"

namespace qwen2vl::cpu {
namespace {

// Eight pages in the 2B shape: seven huge pages of 2 MiB to the byte.
constexpr int64_t kSlabBytes = int64_t{16} << 20;
constexpr int64_t kMostSlabPages = 8;

}  // namespace

PagedKvCache::PagedKvCache(const TextConfig& config, Precision precision, const SplitChannels& split)
    : heads_(config.num_key_value_heads),
      head_dim_(config.head_dim),
      element_bytes_(precision == Precision::Exact ? 4 : 2),
      split_(half() ? split : SplitChannels()) {
  const int64_t value_panels = (head_dim_ + kPanelRows - 1) / kPanelRows;
  value_bytes_ = kPageCells * value_panels * kPanelRows * element_bytes_;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    layer_offsets_.push_back(page_bytes_);
    page_bytes_ += heads_ * head_bytes(layer);
  }
  slab_pages_ = std::clamp<int64_t>(kSlabBytes / page_bytes_, 1, kMostSlabPages);
}

void PagedKvCache::truncate(int64_t size) {
  if (size < 0 || size > size_)
    throw std::invalid_argument("cannot truncate a cache to more cells than it has");
  size_ = size;
  pages_.resize((size + kPageCells - 1) / kPageCells);
  slabs_.resize((static_cast<int64_t>(pages_.size()) + slab_pages_ - 1) / slab_pages_);
}

void PagedKvCache::reserve(int64_t cells) {
  const size_t pages = static_cast<size_t>((size_ + cells + kPageCells - 1) / kPageCells);
  while (pages_.size() < pages) {
    const int64_t index = static_cast<int64_t>(pages_.size());
    if (index == static_cast<int64_t>(slabs_.size()) * slab_pages_)
      slabs_.emplace_back(slab_pages_ * page_bytes_);  // the system gives memory to what is written to alone
    uint8_t* page = slabs_.back().data() + index % slab_pages_ * page_bytes_;
    std::memset(page, 0, page_bytes_);  // kernels read whole panels; what they read must be a number
    pages_.push_back(page);
  }
}

const uint8_t* PagedKvCache::keys(int64_t page, int64_t layer, int64_t head) const {
  return pages_[page] + layer_offsets_[layer] + head * head_bytes(layer);
}

const uint8_t* PagedKvCache::values(int64_t page, int64_t layer, int64_t head) const {
  return keys(page, layer, head) + key_bytes(layer);
}

void PagedKvCache::write(const KernelTable& kernels, int64_t layer, int64_t cell, const float* k,
                         const float* v) {
  constexpr int64_t kPart = 8 * kPanelRows;  // dims converted at a time
  uint16_t part[kPart];
  const int64_t slot = cell % kPageCells;
  const int64_t panel = key_panel_elements(layer), head_stride = head_bytes(layer);
  uint8_t* keys = pages_[cell / kPageCells] + layer_offsets_[layer];
  for (int64_t head = 0; head < heads_; ++head, k += head_dim_, v += head_dim_, keys += head_stride) {
    uint8_t* values = keys + key_bytes(layer);
    if (!half()) {
      store_key(k, 0, head_dim_, slot, panel, reinterpret_cast<float*>(keys));
      store_value(v, 0, head_dim_, slot, reinterpret_cast<float*>(values));
      continue;
    }
    for (int64_t d = 0; d < head_dim_; d += kPart) {
      const int64_t n = std::min(kPart, head_dim_ - d);
      kernels.convert_f32_to_f16(k + d, part, n);
      store_key(part, d, n, slot, panel, reinterpret_cast<uint16_t*>(keys));
      kernels.convert_f32_to_f16(v + d, part, n);
      store_value(part, d, n, slot, reinterpret_cast<uint16_t*>(values));
    }
    const std::span<const int32_t> dims = split(layer, head);
    for (size_t i = 0; i < dims.size(); ++i)
      part[i] = f32_to_f16(k[dims[i]] - f16_to_f32(f32_to_f16(k[dims[i]])));
    store_key(part, head_dim_, static_cast<int64_t>(dims.size()), slot, panel,
              reinterpret_cast<uint16_t*>(keys));
  }
}

/// Dims [begin, begin + n) of one cell's key to its page; `panel`: key_panel_elements.
template <typename T>
void PagedKvCache::store_key(const T* part, int64_t begin, int64_t n, int64_t slot, int64_t panel,
                             T* keys) const {
  keys += slot / kPanelRows * panel + begin * kPanelRows + slot % kPanelRows;
  for (int64_t d = 0; d < n; ++d) keys[d * kPanelRows] = part[d];
}

/// Likewise of its value; `begin` is a multiple of 16.
template <typename T>
void PagedKvCache::store_value(const T* part, int64_t begin, int64_t n, int64_t slot, T* values) const {
  values += begin / kPanelRows * value_panel_elements() + slot * kPanelRows;
  for (int64_t d = 0; d < n; d += kPanelRows, values += value_panel_elements())
    std::memcpy(values, part + d, static_cast<size_t>(std::min(kPanelRows, n - d)) * sizeof(T));
}

}  // namespace qwen2vl::cpu
