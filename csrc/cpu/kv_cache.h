#pragma once

#include <vector>

#include "base/aligned_buffer.h"
#include "cpu/kernels/kernel_table.h"
#include "cpu/panel_matrix.h"
#include "cpu/split_channels.h"
#include "model/backend.h"

namespace qwen2vl::cpu {

inline constexpr int64_t kPageCells = 64;  ///< four key panels; 1.8 MB a page in the 2B shape

/// Pages of the KV cache, out of slabs that are large enough for the system's huge pages (small ones cost a
/// quarter of the speed at which a long context is read). Each page holds kPageCells cells of every layer and
/// key-value head, in the panels that KernelTable::gemm_* reads, f16 (fast) or float32 (exact):
///   keys    [layer][head][cell / 16][key_dims][16 cells]
///   values  [layer][head][ceil(head_dim / 16)][kPageCells][16 dims]
/// where key_dims are head_dim and, in f16, what rounding left of the split channels.
class KvPages final : public PageStore {
 public:
  KvPages(const TextConfig& config, Precision precision, const SplitChannels& split = {});

  int64_t page_cells() const override { return kPageCells; }
  int64_t page_bytes() const override { return page_bytes_; }
  PageHandle make() override;
  void free(PageHandle page) noexcept override;
  void copy(PageHandle from, PageHandle to) override;

  /// Of all slabs: some of their pages may be free.
  int64_t slab_bytes() const { return static_cast<int64_t>(slabs_.size()) * slab_pages_ * page_bytes_; }

  /// Stores keys and values [num_key_value_heads * head_dim] of cell `slot` of a page.
  void write(const KernelTable& kernels, PageHandle page, int64_t layer, int64_t slot, const float* k,
             const float* v) const;

  bool is_f16() const { return element_bytes_ == 2; }
  /// Addresses of a page's key and value panels of one layer and head.
  const uint8_t* keys(PageHandle page, int64_t layer, int64_t head) const;
  const uint8_t* values(PageHandle page, int64_t layer, int64_t head) const;
  /// The dimensions that have a second part.
  std::span<const int32_t> split(int64_t layer, int64_t head) const { return split_.of(layer, head); }
  int64_t key_dims(int64_t layer) const { return head_dim_ + split_.count(layer); }
  int64_t key_panel_elements(int64_t layer) const { return key_dims(layer) * kPanelRows; }
  int64_t value_panel_elements() const { return kPageCells * kPanelRows; }

 private:
  struct Slab {
    AlignedBuffer memory;
    uint32_t used = 0;  ///< a bit for each page
  };

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
  int64_t slab_pages_;
  std::vector<Slab> slabs_;
};

}  // namespace qwen2vl::cpu
