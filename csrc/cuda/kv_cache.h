#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/context.h"
#include "cuda/kernels/epilogue.cuh"

namespace qwen2vl::cuda {

/// Pages of keys and values (epilogue.cuh: PageLayout), out of slabs that are asked for as they are needed.
class PagePool {
 public:
  PagePool(Context& ctx, PageLayout layout, int64_t layers, int64_t element_bytes);

  uint8_t* take();
  void give_back(uint8_t* page) { free_.push_back(page); }
  int64_t page_bytes() const { return page_bytes_; }
  PageLayout layout() const { return layout_; }

 private:
  Context& ctx_;
  PageLayout layout_;
  int64_t page_bytes_;
  std::vector<DeviceBuffer> slabs_;
  std::vector<uint8_t*> free_;
};

/// One sequence: its pages, and a table of their addresses on the device.
class Cache {
 public:
  Cache(Context& ctx, std::shared_ptr<PagePool> pool) : ctx_(ctx), pool_(std::move(pool)) {}
  ~Cache() { truncate(0); }
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  int64_t size() const { return size_; }
  int64_t allocated_bytes() const { return static_cast<int64_t>(pages_.size()) * pool_->page_bytes(); }
  void truncate(int64_t size);

  /// Pages for `cells` cells beyond size(); they count only after commit.
  void reserve(int64_t cells);
  void commit(int64_t cells) { size_ += cells; }
  uint8_t* const* table() const { return table_.as<uint8_t*>(); }
  int64_t pages() const { return static_cast<int64_t>(pages_.size()); }

 private:
  Context& ctx_;
  std::shared_ptr<PagePool> pool_;
  int64_t size_ = 0;
  std::vector<uint8_t*> pages_;
  DeviceBuffer table_;
};

}  // namespace qwen2vl::cuda
