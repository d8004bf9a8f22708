#include "cpu/causal_tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/half.h"

namespace qwen2vl::cpu {
namespace {

// About as many rows as a full-attention tile, whole tokens of all query heads of a key-value head.
constexpr int64_t kCausalTileRows = 96;
// Cells between two steps of the softmax, in both arithmetics. Scores and probabilities of 96 x 512 (288 KB)
// stay in the second-level cache with keys and values (256 KB at head_dim 128); 256 cells take 2 % longer.
constexpr int64_t kStepCells = 8 * kPageCells;

}  // namespace

int64_t causal_tile_tokens(const TextConfig& config) {
  const int64_t group = config.num_attention_heads / config.num_key_value_heads;
  return std::max<int64_t>(1, kCausalTileRows / group);
}

int64_t causal_tile_rows(const TextConfig& config) {
  return causal_tile_tokens(config) * (config.num_attention_heads / config.num_key_value_heads);
}

size_t CausalTile::scratch_bytes(int64_t rows, int64_t head_dim) {
  const int64_t key_dims = head_dim + 2 * SplitChannels::kMost;
  return Tile::bytes(rows, kStepCells, head_dim, key_dims) +
         static_cast<size_t>(rows * (kStepCells + key_dims)) * sizeof(uint16_t);
}

CausalTile::CausalTile(const KernelTable& kernels, const TextConfig& config, int64_t layer,
                       const CausalTask& task, std::byte* scratch)
    : kernels_(kernels),
      head_dim_(config.head_dim),
      group_(config.num_attention_heads / config.num_key_value_heads),
      layer_(layer),
      task_(task),
      split_(task.sequence->cache->split(layer, task.head)),
      key_dims_(paired() ? PairedCells::key_dims(*task.sequence->cache, layer, head_dim_)
                         : task.sequence->cache->key_dims(layer)),
      rows_((task.token_end - task.token_begin) * group_),
      tile_(scratch, rows_, kStepCells, head_dim_, key_dims_),
      probabilities_(
          reinterpret_cast<uint16_t*>(scratch + Tile::bytes(rows_, kStepCells, head_dim_, key_dims_))),
      paired_queries_(probabilities_ + rows_ * kStepCells),
      scale_(1.0f / std::sqrt(static_cast<float>(config.head_dim))) {}

void CausalTile::gather_queries(const float* qkv, int64_t stride) {
  const int64_t n = static_cast<int64_t>(split_.size());
  for (int64_t r = 0; r < rows_; ++r) {
    const float* q = query(qkv, stride, r);
    if (paired()) {
      uint16_t* out = paired_queries_ + r * key_dims_;
      kernels_.convert_f32_to_bf16(q, out, head_dim_);
      for (int64_t i = 0; i < n; ++i) {
        out[head_dim_ + i] = out[split_[i]];
        out[head_dim_ + n + i] = f32_to_bf16(q[split_[i]] - bf16_to_f32(out[split_[i]]));
      }
    } else {
      float* out = tile_.queries + r * key_dims_;
      std::memcpy(out, q, head_dim_ * sizeof(float));
      for (int64_t i = 0; i < n; ++i) out[head_dim_ + i] = q[split_[i]];
    }
  }
}

void CausalTile::run() {
  tile_.start(rows_, head_dim_);
  const int64_t end = std::min(task_.page_end * kPageCells, visible(task_.token_end - 1));
  for (int64_t cell = task_.page_begin * kPageCells; cell < end; cell += kStepCells) {
    const int64_t n = std::min(kStepCells, end - cell);
    if (paired())
      paired_step(cell, n);
    else
      step(cell, n);
  }
}

void CausalTile::scatter_output(float* qkv, int64_t stride) const {
  for (int64_t r = 0; r < rows_; ++r) {
    kernels_.scale_row(tile_.output + r * head_dim_, 1.0f / tile_.sum[r], head_dim_);
    std::memcpy(const_cast<float*>(query(qkv, stride, r)), tile_.output + r * head_dim_,
                head_dim_ * sizeof(float));
  }
}

void CausalTile::save_partial(float* out) const {
  for (int64_t r = 0; r < rows_; ++r, out += head_dim_ + 2) {
    std::memcpy(out, tile_.output + r * head_dim_, head_dim_ * sizeof(float));
    out[head_dim_] = tile_.maximum[r];
    out[head_dim_ + 1] = tile_.sum[r];
  }
}

const float* CausalTile::query(const float* qkv, int64_t stride, int64_t r) const {
  const int64_t row = task_.sequence->first_row + task_.token_begin + r / group_;
  return qkv + row * stride + (task_.head * group_ + r % group_) * head_dim_;
}

/// softmax(begin, end, n) for each token's rows and the n of `cells` from `cell` that they see, if any; then
/// clear(row, n) for each row.
template <typename Softmax, typename Clear>
void CausalTile::for_tokens(int64_t cell, int64_t cells, const Softmax& softmax, const Clear& clear) {
  for (int64_t r = 0; r < rows_; r += group_) {
    const int64_t n = std::clamp<int64_t>(visible(task_.token_begin + r / group_) - cell, 0, cells);
    if (n > 0) {
      softmax(r, r + group_, n);
      for (int64_t i = r; i < r + group_; ++i)
        if (tile_.factors[i] != 1.0f)
          kernels_.scale_row(tile_.output + i * head_dim_, tile_.factors[i], head_dim_);
    }
    for (int64_t i = 0; i < group_; ++i) clear(r + i, n);
  }
}

void CausalTile::paired_step(int64_t cell, int64_t n) {
  const int64_t even = n + n % 2;
  kernels_.gemm_bf16_pairs(paired_queries_, key_dims_, task_.paired.keys + cell * key_dims_,
                           key_dims_ * kPanelRows, rows_, n, key_dims_,
                           {tile_.scores, kStepCells, nullptr, Store::Overwrite});
  for_tokens(
      cell, n,
      [&](int64_t r, int64_t rows_end, int64_t seen) {
        kernels_.softmax_steps_bf16(tile_.scores + r * kStepCells, kStepCells, rows_end - r, seen, scale_,
                                    tile_.maximum + r, tile_.sum + r, tile_.factors + r,
                                    probabilities_ + r * kStepCells, kStepCells);
      },
      [&](int64_t r, int64_t seen) {
        uint16_t* probabilities = probabilities_ + r * kStepCells;
        std::fill(probabilities + seen, probabilities + even, uint16_t{0});
      });
  for (int64_t at = 0; at < n; at += kValueCells)
    kernels_.gemm_bf16_pairs(
        probabilities_ + at, kStepCells,
        task_.paired.values + (cell + at) / kValueCells * panels(head_dim_) * PairedCells::kValuePanel,
        PairedCells::kValuePanel, rows_, head_dim_, std::min(kValueCells, even - at),
        {tile_.output, head_dim_, nullptr, Store::Accumulate});
}

void CausalTile::step(int64_t cell, int64_t n) {
  const KvPages& cache = *task_.sequence->cache;
  const int64_t first = cell / kPageCells, last = (cell + n - 1) / kPageCells;
  const auto keys = [&](int64_t page) { return task_.sequence->keys(page, layer_, task_.head); };
  const auto values = [&](int64_t page) { return task_.sequence->values(page, layer_, task_.head); };
  const auto cells_of = [&](int64_t page) { return std::min(kPageCells, cell + n - page * kPageCells); };

  for (int64_t page = first; page <= last; ++page)
    gemm(tile_.queries, key_dims_, keys(page), cache.key_panel_elements(layer_), cells_of(page), key_dims_,
         {tile_.scores + (page - first) * kPageCells, kStepCells, nullptr, Store::Overwrite},
         page < last ? keys(page + 1) : values(first));
  for_tokens(
      cell, n,
      [&](int64_t begin, int64_t rows_end, int64_t seen) {
        for (int64_t r = begin; r < rows_end; ++r)
          tile_.factors[r] = kernels_.softmax_step(tile_.scores + r * kStepCells, seen, scale_,
                                                   tile_.maximum + r, tile_.sum + r);
      },
      [&](int64_t r, int64_t seen) {
        float* scores = tile_.scores + r * kStepCells;
        std::fill(scores + seen, scores + n, 0.0f);
      });
  for (int64_t page = first; page <= last; ++page)
    gemm(tile_.scores + (page - first) * kPageCells, kStepCells, values(page), cache.value_panel_elements(),
         head_dim_, cells_of(page), {tile_.output, head_dim_, nullptr, Store::Accumulate},
         page < last                                              ? values(page + 1)
         : (last + 1) * kPageCells < visible(task_.token_end - 1) ? keys(last + 1)
                                                                  : values(page));
}

void CausalTile::gemm(const float* a, int64_t a_stride, const uint8_t* b, int64_t panel, int64_t n_cols,
                      int64_t depth, const MatmulOutput& out, const uint8_t* ahead) const {
  const auto* b16 = reinterpret_cast<const uint16_t*>(b);
  if (!task_.sequence->cache->is_f16())
    kernels_.gemm_f32(a, a_stride, reinterpret_cast<const float*>(b), panel, rows_, n_cols, depth, out);
  else if (rows_ > kMemoryBoundRows)
    kernels_.gemm_f16(a, a_stride, b16, panel, rows_, n_cols, depth, out);
  else
    kernels_.gemm_f16_ahead(a, a_stride, b16, panel, rows_, n_cols, depth, out,
                            reinterpret_cast<const uint16_t*>(ahead));
}

}  // namespace qwen2vl::cpu
