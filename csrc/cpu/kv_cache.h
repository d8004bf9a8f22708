#pragma once

#include <vector>

#include "base/aligned_buffer.h"
#include "cpu/kernels/kernel_table.h"
#include "cpu/panel_matrix.h"
#include "cpu/split_channels.h"
#include "model/backend.h"

namespace qwen2vl::cpu {

inline constexpr int64_t kPageCells = 64;  ///< four key panels; 1.8 MB a page in the 2B shape

/// A paged cache: memory grows with use, page by page out of slabs that are large enough for the system's
/// huge pages (small ones cost a quarter of the speed at which a long context is read). Each page holds
/// kPageCells cells of every layer and key-value head, in the panels that KernelTable::gemm_* reads, f16
/// (fast) or float32 (exact):
///   keys    [layer][head][cell / 16][key_dims][16 cells]
///   values  [layer][head][ceil(head_dim / 16)][kPageCells][16 dims]
/// where key_dims are head_dim and, in f16, what rounding left of the split channels.
class PagedKvCache final : public KvCache {
 public:
  PagedKvCache(const TextConfig& config, Precision precision, const SplitChannels& split = {});

  int64_t size() const override { return size_; }
  void truncate(int64_t size) override;
  int64_t allocated_bytes() const override { return static_cast<int64_t>(pages_.size()) * page_bytes_; }

  /// Pages for `cells` cells beyond size(). They count only after commit; an abandoned append is overwritten.
  void reserve(int64_t cells);
  void commit(int64_t cells) { size_ += cells; }

  /// Stores keys and values [num_key_value_heads * head_dim] of one cell (below size() + what was reserved).
  void write(const KernelTable& kernels, int64_t layer, int64_t cell, const float* k, const float* v);

  bool half() const { return element_bytes_ == 2; }
  /// Addresses of a page's key and value panels of one layer and head.
  const uint8_t* keys(int64_t page, int64_t layer, int64_t head) const;
  const uint8_t* values(int64_t page, int64_t layer, int64_t head) const;
  /// The dimensions that have a second part.
  std::span<const int32_t> split(int64_t layer, int64_t head) const { return split_.of(layer, head); }
  int64_t key_dims(int64_t layer) const { return head_dim_ + split_.count(layer); }
  int64_t key_panel_elements(int64_t layer) const { return key_dims(layer) * kPanelRows; }
  int64_t value_panel_elements() const { return kPageCells * kPanelRows; }

 private:
  template <typename T>
  void store_key(const T* part, int64_t begin, int64_t n, int64_t slot, int64_t panel, T* keys) const;
  template <typename T>
  void store_value(const T* part, int64_t begin, int64_t n, int64_t slot, T* values) const;

  int64_t key_bytes(int64_t layer) const { return kPageCells * key_dims(layer) * element_bytes_; }
  int64_t head_bytes(int64_t layer) const { return key_bytes(layer) + value_bytes_; }

  int64_t heads_, head_dim_, element_bytes_, value_bytes_;
  int64_t page_bytes_ = 0;
  SplitChannels split_;
  std::vector<int64_t> layer_offsets_;
  int64_t size_ = 0;
  int64_t slab_pages_;
  std::vector<AlignedBuffer> slabs_;
  std::vector<uint8_t*> pages_;
};

}  // namespace qwen2vl::cpu
