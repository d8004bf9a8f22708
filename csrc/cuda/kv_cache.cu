#include <algorithm>
#include <utility>

#include "cuda/kv_cache.h"

namespace qwen2vl::cuda {
namespace {

constexpr int64_t kSlabBytes = int64_t{32} << 20;  // asking the device takes long: not page by page
constexpr size_t kTableStep = 64;                  // pages by which a table grows

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

void PagePool::copy(const uint8_t* from, uint8_t* to) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(page_bytes_), cudaMemcpyDeviceToDevice, ctx_.stream),
        "copying a page");
}

void PageTables::put(std::span<const SequenceRows> batch) {
  std::vector<Page*> pages;
  firsts_.clear();
  for (const SequenceRows& s : batch) {
    firsts_.push_back(static_cast<int64_t>(pages.size()));
    pages.insert(pages.end(), s.pages.begin(), s.pages.end());
    // With room to grow: the tables behind it stay where they are.
    pages.resize((pages.size() + kTableStep - 1) / kTableStep * kTableStep, nullptr);
  }
  if (pages == pages_) return;
  pages_ = std::move(pages);
  ++version_;
}

bool PageTables::holds(const SequenceRows& sequence) const {
  return firsts_.size() == 1 && sequence.pages.size() <= pages_.size() &&
         std::equal(sequence.pages.begin(), sequence.pages.end(), pages_.begin());
}

}  // namespace qwen2vl::cuda
