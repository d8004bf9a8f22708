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

/// Consecutive rows of one sequence.
struct SequenceRows {
  std::span<uint8_t* const> pages;  ///< of all its cells, those of the rows included
  int64_t first_cell;               ///< of the rows
  int64_t n;
  const int32_t* token_ids;
  const float* const* embeddings;
  const int32_t* positions;
  int32_t logits;  ///< 0 none, 1 of the last row, 2 of all
};

/// On the device, for each sequence of a batch, the addresses of its pages.
class PageTables {
 public:
  /// Uploads what is not there yet: from one step to the next, tables seldom change. What the last call has
  /// uploaded must have arrived.
  void put(Context& ctx, std::span<const SequenceRows> batch);
  /// Whether the last put's batch was this sequence with these pages.
  bool holds(const SequenceRows& sequence) const;
  uint8_t* const* table(size_t sequence) const { return tables_.as<uint8_t*>() + firsts_[sequence]; }

 private:
  DeviceBuffer tables_;
  std::vector<uint8_t*> uploaded_;
  std::vector<int64_t> firsts_;  // of each sequence's table
};

}  // namespace qwen2vl::cuda
