#include <algorithm>

#include "cuda/kv_cache.h"

namespace qwen2vl::cuda {
namespace {

constexpr int64_t kSlabBytes = int64_t{32} << 20;  // asking the device takes long: not page by page

}  // namespace

PagePool::PagePool(Context& ctx, PageLayout layout, int64_t layers, int64_t element_bytes)
    : ctx_(ctx), layout_(layout), page_bytes_(layout.panel(static_cast<int>(layers), 0, 0) * element_bytes) {}

uint8_t* PagePool::take() {
  if (free_.empty()) {
    const int64_t n = std::max<int64_t>(1, kSlabBytes / page_bytes_);
    DeviceBuffer slab(n * page_bytes_);
    // Dimensions that fill a head up are never written: they have to be zero.
    check(cudaMemsetAsync(slab.as(), 0, static_cast<size_t>(n * page_bytes_), ctx_.stream), "cudaMemset");
    for (int64_t i = n; i-- > 0;) free_.push_back(slab.as() + i * page_bytes_);
    slabs_.push_back(std::move(slab));
  }
  uint8_t* page = free_.back();
  free_.pop_back();
  return page;
}

void Cache::truncate(int64_t size) {
  size_ = std::min(size_, size);
  const size_t keep = static_cast<size_t>((size_ + kPageCells - 1) / kPageCells);
  while (pages_.size() > keep) {
    pool_->give_back(pages_.back());
    pages_.pop_back();
  }
}

void Cache::reserve(int64_t cells) {
  const int64_t wanted = (size_ + cells + kPageCells - 1) / kPageCells, had = pages();
  if (wanted <= had) return;
  while (pages() < wanted) pages_.push_back(pool_->take());
  const int64_t bytes = wanted * 8;
  const bool grown = bytes > table_.bytes();
  if (grown) {
    ctx_.synchronize();  // a step that reads the old table may be at work
    table_.resize(std::max<int64_t>(2 * bytes, 4096 * 8));
  }
  const int64_t first = grown ? 0 : had;
  // From pageable memory: taken over before the call returns.
  ctx_.copy_to_device(table_.as() + first * 8, pages_.data() + first, (wanted - first) * 8);
}

}  // namespace qwen2vl::cuda
