#pragma once

#include <cstdint>
#include <span>
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
  void copy(const uint8_t* from, uint8_t* to);
  int64_t page_bytes() const { return page_bytes_; }
  PageLayout layout() const { return layout_; }

 private:
  Context& ctx_;
  PageLayout layout_;
  int64_t page_bytes_;
  std::vector<DeviceBuffer> slabs_;
  std::vector<uint8_t*> free_;
};

/// A page of the cache: of every stage's layers, a part on its device.
struct Page {
  std::vector<uint8_t*> parts;
};

/// Consecutive rows of one sequence.
struct SequenceRows {
  std::span<Page* const> pages;  ///< of all its cells, those of the rows included
  int64_t first_cell;            ///< of the rows
  int64_t n;
  const int32_t* token_ids;
  const float* const* embeddings;
  const int32_t* positions;
  int32_t logits;  ///< 0 none, 1 of the last row, 2 of all
};

/// The pages of each sequence of a batch, one after another.
class PageTables {
 public:
  void put(std::span<const SequenceRows> batch);
  /// Whether the last put's batch was this sequence with these pages.
  bool holds(const SequenceRows& sequence) const;

  const std::vector<Page*>& pages() const { return pages_; }  ///< null where a table has room to grow
  int64_t first(size_t sequence) const { return firsts_[sequence]; }
  /// Another number means other pages: from one step to the next, they seldom change.
  int64_t version() const { return version_; }

 private:
  std::vector<Page*> pages_;
  std::vector<int64_t> firsts_;
  int64_t version_ = 0;
};

}  // namespace qwen2vl::cuda
