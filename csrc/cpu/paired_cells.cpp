#include "cpu/paired_cells.h"

#include <algorithm>
#include <span>

#include "base/half.h"

namespace qwen2vl::cpu {
namespace {

/// What stands behind a key's dimensions, of the cells of one panel.
void pack_split(const uint16_t* panel, std::span<const int32_t> split, int64_t head_dim, uint16_t* pairs) {
  const int64_t n = static_cast<int64_t>(split.size());
  const auto at = [&](int64_t dim, int64_t cell) -> uint16_t& {
    return pairs[dim / 2 * 2 * kPanelRows + cell * 2 + dim % 2];
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t cell = 0; cell < kPanelRows; ++cell) {
      const float key = f16_to_f32(panel[split[i] * kPanelRows + cell]);
      const float rest = f16_to_f32(panel[(head_dim + i) * kPanelRows + cell]);
      const uint16_t rounded = f32_to_bf16(key);
      at(head_dim + i, cell) = f32_to_bf16(key - bf16_to_f32(rounded) + rest);
      at(head_dim + n + i, cell) = rounded;
    }
}

}  // namespace

void PairedCells::pack_page(const KernelTable& kernels, const CausalRows& sequence, int64_t page,
                            int64_t layer, int64_t head, int64_t head_dim) const {
  const KvPages& cache = *sequence.cache;
  const auto* k = reinterpret_cast<const uint16_t*>(sequence.keys(page, layer, head));
  const auto* v = reinterpret_cast<const uint16_t*>(sequence.values(page, layer, head));
  const int64_t cell = page * kPageCells, n = std::min(kPageCells, sequence.cells() - cell);
  const std::span<const int32_t> split = cache.split(layer, head);
  const int64_t paired_dims = key_dims(cache, layer, head_dim);
  if (split.empty()) {
    kernels.pair_f16_panel(k, panels(kPageCells) * head_dim, keys + cell * head_dim);
  } else {
    for (int64_t p = 0; p < panels(kPageCells); ++p) {
      const uint16_t* panel = k + p * cache.key_panel_elements(layer);
      uint16_t* pairs = keys + (cell + p * kPanelRows) * paired_dims;
      kernels.pair_f16_panel(panel, head_dim, pairs);
      pack_split(panel, split, head_dim, pairs);
    }
  }
  uint16_t* out =
      values + cell / kValueCells * panels(head_dim) * kValuePanel + cell % kValueCells * kPanelRows;
  for (int64_t p = 0; p < panels(head_dim); ++p)
    kernels.pair_f16_panel(v + p * cache.value_panel_elements(), n, out + p * kValuePanel);
}

}  // namespace qwen2vl::cpu
