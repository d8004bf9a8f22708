#include "cpu/kv_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/half.h"

namespace qwen2vl::cpu {
namespace {

// Eight pages in the 2B shape: seven huge pages of 2 MiB to the byte.
constexpr int64_t kSlabBytes = int64_t{16} << 20;
constexpr int64_t kMostSlabPages = 8;

}  // namespace

KvPages::KvPages(const TextConfig& config, Precision precision, const SplitChannels& split)
    : heads_(config.num_key_value_heads),
      head_dim_(config.head_dim),
      element_bytes_(precision == Precision::Exact ? 4 : 2),
      split_(is_f16() ? split : SplitChannels()) {
  const int64_t value_panels = (head_dim_ + kPanelRows - 1) / kPanelRows;
  value_bytes_ = kPageCells * value_panels * kPanelRows * element_bytes_;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    layer_offsets_.push_back(page_bytes_);
    page_bytes_ += heads_ * head_bytes(layer);
  }
  slab_pages_ = std::clamp<int64_t>(kSlabBytes / page_bytes_, 1, kMostSlabPages);
}

PageHandle KvPages::make() {
  const uint32_t full = (uint32_t{1} << slab_pages_) - 1;
  auto slab = std::find_if(slabs_.begin(), slabs_.end(), [&](const Slab& s) { return s.used != full; });
  if (slab == slabs_.end())  // the system gives memory to what is written to alone
    slab = slabs_.insert(slab, {AlignedBuffer(static_cast<size_t>(slab_pages_ * page_bytes_))});
  const int index = std::countr_one(slab->used);
  slab->used |= uint32_t{1} << index;
  uint8_t* page = slab->memory.data() + index * page_bytes_;
  std::memset(page, 0, page_bytes_);  // kernels read whole panels; what they read must be a number
  return page;
}

void KvPages::free(PageHandle page) noexcept {
  const auto* at = static_cast<const uint8_t*>(page);
  const auto offset = [&](const Slab& slab) { return at - slab.memory.data(); };
  const auto slab = std::find_if(slabs_.begin(), slabs_.end(), [&](const Slab& s) {
    return offset(s) >= 0 && offset(s) < slab_pages_ * page_bytes_;
  });
  slab->used &= ~(uint32_t{1} << (offset(*slab) / page_bytes_));
  if (slab->used == 0) slabs_.erase(slab);
}

void KvPages::copy(PageHandle from, PageHandle to) { std::memcpy(to, from, page_bytes_); }

const uint8_t* KvPages::keys(PageHandle page, int64_t layer, int64_t head) const {
  return static_cast<const uint8_t*>(page) + layer_offsets_[layer] + head * head_bytes(layer);
}

const uint8_t* KvPages::values(PageHandle page, int64_t layer, int64_t head) const {
  return keys(page, layer, head) + key_bytes(layer);
}

void KvPages::write(const KernelTable& kernels, PageHandle page, int64_t layer, int64_t slot, const float* k,
                    const float* v) const {
  constexpr int64_t kPart = 8 * kPanelRows;  // dims converted at a time
  uint16_t part[kPart];
  const int64_t panel = key_panel_elements(layer), head_stride = head_bytes(layer);
  uint8_t* keys = static_cast<uint8_t*>(page) + layer_offsets_[layer];
  for (int64_t head = 0; head < heads_; ++head, k += head_dim_, v += head_dim_, keys += head_stride) {
    uint8_t* values = keys + key_bytes(layer);
    if (!is_f16()) {
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
void KvPages::store_key(const T* part, int64_t begin, int64_t n, int64_t slot, int64_t panel, T* keys) const {
  keys += slot / kPanelRows * panel + begin * kPanelRows + slot % kPanelRows;
  for (int64_t d = 0; d < n; ++d) keys[d * kPanelRows] = part[d];
}

/// Likewise of its value; `begin` is a multiple of 16.
template <typename T>
void KvPages::store_value(const T* part, int64_t begin, int64_t n, int64_t slot, T* values) const {
  values += begin / kPanelRows * value_panel_elements() + slot * kPanelRows;
  for (int64_t d = 0; d < n; d += kPanelRows, values += value_panel_elements())
    std::memcpy(values, part + d, static_cast<size_t>(std::min(kPanelRows, n - d)) * sizeof(T));
}

}  // namespace qwen2vl::cpu
