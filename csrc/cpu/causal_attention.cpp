#include "cpu/causal_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/attention_tile.h"

namespace qwen2vl::cpu {
// ----------------------------------------------------------------------------------------

namespace {

// About as many rows as a full-attention tile, whole tokens of all query heads of a key-value head.
constexpr int64_t kCausalTileRows = 96;

/// Some query tokens of one key-value head against some pages.
struct CausalTask {
  const CausalRows* sequence;
  int64_t head;                    ///< key-value head
  int64_t token_begin, token_end;  ///< within the sequence's rows
  int64_t page_begin, page_end;
};

class CausalTile {
 public:
  CausalTile(const KernelTable& kernels, const TextConfig& config, int64_t layer, const CausalTask& task,
             const Tile& tile)
      : kernels_(kernels),
        head_dim_(config.head_dim),
        group_(config.num_attention_heads / config.num_key_value_heads),
        layer_(layer),
        task_(task),
        tile_(tile),
        rows_((task.token_end - task.token_begin) * group_),
        scale_(1.0f / std::sqrt(static_cast<float>(config.head_dim))) {}

  void gather_queries(const float* qkv, int64_t stride) {
    for (int64_t r = 0; r < rows_; ++r)
      std::memcpy(tile_.queries + r * head_dim_, query(qkv, stride, r), head_dim_ * sizeof(float));
  }

  void run() {
    tile_.start(rows_, head_dim_);
    for (int64_t page = task_.page_begin; page < task_.page_end; ++page) step(page);
  }

  /// The normalized result to where the queries stood.
  void scatter_output(float* qkv, int64_t stride) const {
    for (int64_t r = 0; r < rows_; ++r) {
      kernels_.scale_row(tile_.output + r * head_dim_, 1.0f / tile_.sum[r], head_dim_);
      std::memcpy(const_cast<float*>(query(qkv, stride, r)), tile_.output + r * head_dim_,
                  head_dim_ * sizeof(float));
    }
  }

  void save_partial(float* out) const {
    for (int64_t r = 0; r < rows_; ++r, out += head_dim_ + 2) {
      std::memcpy(out, tile_.output + r * head_dim_, head_dim_ * sizeof(float));
      out[head_dim_] = tile_.maximum[r];
      out[head_dim_ + 1] = tile_.sum[r];
    }
  }

 private:
  const float* query(const float* qkv, int64_t stride, int64_t r) const {
    const int64_t row = task_.sequence->first_row + task_.token_begin + r / group_;
    return qkv + row * stride + (task_.head * group_ + r % group_) * head_dim_;
  }

  void gemm(const float* a, int64_t a_stride, const uint8_t* b, int64_t panel, int64_t n_cols, int64_t depth,
            const MatmulOutput& out) const {
    if (task_.sequence->cache->half())
      kernels_.gemm_f16(a, a_stride, reinterpret_cast<const uint16_t*>(b), panel, rows_, n_cols, depth, out);
    else
      kernels_.gemm_f32(a, a_stride, reinterpret_cast<const float*>(b), panel, rows_, n_cols, depth, out);
  }

  void step(int64_t page) {
    const PagedKvCache& cache = *task_.sequence->cache;
    // Cells of this page that a token sees: those up to its own.
    const auto visible = [&](int64_t token) {
      return std::clamp<int64_t>(task_.sequence->first_cell + token + 1 - page * kPageCells, 0, kPageCells);
    };
    const int64_t keys = visible(task_.token_end - 1);
    gemm(tile_.queries, head_dim_, cache.keys(page, layer_, task_.head), cache.key_panel_elements(), keys,
         head_dim_, {tile_.scores, kPageCells, nullptr, Store::Overwrite});
    for (int64_t r = 0; r < rows_; ++r) {
      float* scores = tile_.scores + r * kPageCells;
      const int64_t n = visible(task_.token_begin + r / group_);
      if (n > 0) {
        const float factor = kernels_.softmax_step(scores, n, scale_, tile_.maximum + r, tile_.sum + r);
        if (factor != 1.0f) kernels_.scale_row(tile_.output + r * head_dim_, factor, head_dim_);
      }
      std::fill(scores + n, scores + keys, 0.0f);
    }
    gemm(tile_.scores, kPageCells, cache.values(page, layer_, task_.head), cache.value_panel_elements(),
         head_dim_, keys, {tile_.output, head_dim_, nullptr, Store::Accumulate});
  }

  const KernelTable& kernels_;
  int64_t head_dim_, group_, layer_;
  const CausalTask& task_;
  Tile tile_;
  int64_t rows_;
  float scale_;
};

/// Each row against the cells up to its own; each cell's keys and values once.
Work causal_work(const TextConfig& config, std::span<const CausalRows> sequences) {
  Work work;
  for (const CausalRows& s : sequences) {
    const double rows = static_cast<double>(s.rows), cells = static_cast<double>(s.first_cell) + rows;
    work.float_ops += 4 * static_cast<double>(config.q_size()) * rows * (cells - (rows - 1) / 2);
    work.bytes += cells * 2 * static_cast<double>(config.kv_size()) * (s.cache->half() ? 2 : 4);
  }
  return work;
}

/// Splits of one tile over pages, merged by their maxima and sums.
void merge_partials(const KernelTable& kernels, float* partials, int64_t splits, int64_t split_stride,
                    int64_t head_dim, float* out) {
  float maximum = kMinusInfinity;
  for (int64_t s = 0; s < splits; ++s) maximum = std::max(maximum, partials[s * split_stride + head_dim]);
  float sum = 0;
  for (int64_t s = 0; s < splits; ++s) {
    float* partial = partials + s * split_stride;
    const float factor = std::exp(partial[head_dim] - maximum);
    sum += factor * partial[head_dim + 1];
    kernels.scale_row(partial, factor, head_dim);
    if (s > 0) kernels.add_row(partials, partial, head_dim);
  }
  kernels.scale_row(partials, 1.0f / sum, head_dim);
  std::memcpy(out, partials, head_dim * sizeof(float));
}

}  // namespace

void CausalAttention::operator()(Context& ctx, int64_t layer, std::span<const CausalRows> sequences,
                                 float* qkv, int64_t qkv_stride) {
  const auto stage = ctx.profile.stage("text attention", causal_work(config_, sequences));
  const int64_t kv_heads = config_.num_key_value_heads, head_dim = config_.head_dim;
  const int64_t group = config_.num_attention_heads / kv_heads;
  const int64_t tile_tokens = std::max<int64_t>(1, kCausalTileRows / group);
  const int64_t tile_rows = tile_tokens * group;
  ctx.reserve_scratch(Tile::bytes(tile_rows, kPageCells, head_dim));

  // A lone token of one sequence gives only kv_heads tasks: then the pages are split too, and merged after.
  const bool single = sequences.size() == 1 && sequences[0].rows == 1;
  const int64_t all_pages = single ? sequences[0].first_cell / kPageCells + 1 : 0;
  const int64_t threads = ctx.pool.size();
  const int64_t splits =
      single && kv_heads % threads != 0
          ? std::clamp<int64_t>(4 * threads / kv_heads, 1, std::max<int64_t>(1, all_pages / 2))
          : 1;

  std::vector<CausalTask> tasks;
  for (const CausalRows& sequence : sequences)
    for (int64_t token = 0; token < sequence.rows; token += tile_tokens) {
      const int64_t end = std::min(token + tile_tokens, sequence.rows);
      const int64_t pages = (sequence.first_cell + end + kPageCells - 1) / kPageCells;
      for (int64_t head = 0; head < kv_heads; ++head)
        for (int64_t s = 0; s < splits; ++s)
          tasks.push_back({&sequence, head, token, end, pages * s / splits, pages * (s + 1) / splits});
    }
  // The last tokens see the most cells: longest tasks first, so that the threads end together.
  if (splits == 1) std::reverse(tasks.begin(), tasks.end());

  const int64_t partial_row = head_dim + 2, split_stride = group * partial_row;
  float* partial = splits > 1 ? partial_.resize(static_cast<int64_t>(tasks.size()) * split_stride) : nullptr;
  ctx.pool.parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t t = begin; t < end; ++t) {
      CausalTile tile(ctx.kernels, config_, layer, tasks[t],
                      Tile(ctx.scratch(thread), tile_rows, kPageCells, head_dim));
      tile.gather_queries(qkv, qkv_stride);
      tile.run();
      if (splits == 1)
        tile.scatter_output(qkv, qkv_stride);
      else
        tile.save_partial(partial + t * split_stride);
    }
  });
  if (splits == 1) return;
  float* out = qkv + sequences[0].first_row * qkv_stride;
  for (int64_t head = 0; head < kv_heads; ++head)
    for (int64_t j = 0; j < group; ++j)
      merge_partials(ctx.kernels, partial + head * splits * split_stride + j * partial_row, splits,
                     split_stride, head_dim, out + (head * group + j) * head_dim);
}

}  // namespace qwen2vl::cpu
