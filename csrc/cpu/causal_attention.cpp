#include "cpu/causal_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/causal_tile.h"
#include "cpu/paired_cells.h"

namespace qwen2vl::cpu {
namespace {

// Pages of a decoded token's task: half a megabyte of keys and values at head_dim 128.
constexpr int64_t kSplitPages = 16;

/// Each row against the cells up to its own; each cell's keys and values once.
Work causal_work(const TextConfig& config, std::span<const CausalRows> sequences) {
  Work work;
  for (const CausalRows& s : sequences) {
    const double rows = static_cast<double>(s.rows), cells = static_cast<double>(s.first_cell) + rows;
    work.float_ops += 4 * static_cast<double>(config.q_size()) * rows * (cells - (rows - 1) / 2);
    work.bytes += cells * 2 * static_cast<double>(config.kv_size()) * (s.cache->is_f16() ? 2 : 4);
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

/// Tasks of whole tiles for the key-value heads [head_begin, head_end), those with the most cells first so
/// that the threads end together.
std::vector<CausalTask> whole_tasks(const TextConfig& config, std::span<const CausalRows> sequences,
                                    int64_t head_begin, int64_t head_end) {
  const int64_t tokens = causal_tile_tokens(config);
  std::vector<CausalTask> tasks;
  for (const CausalRows& sequence : sequences)
    for (int64_t token = 0; token < sequence.rows; token += tokens) {
      const int64_t end = std::min(token + tokens, sequence.rows);
      const int64_t pages = (sequence.first_cell + end + kPageCells - 1) / kPageCells;
      for (int64_t head = head_begin; head < head_end; ++head)
        tasks.push_back({&sequence, head, token, end, 0, pages});
    }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const CausalTask& a, const CausalTask& b) { return a.page_end > b.page_end; });
  return tasks;
}

}  // namespace

void CausalAttention::operator()(Context& ctx, int64_t layer, std::span<const CausalRows> sequences,
                                 float* qkv, int64_t qkv_stride) {
  const auto stage = ctx.profile.stage("text attention", causal_work(config_, sequences));
  const QkvRows rows{layer, qkv, qkv_stride};
  ctx.scratch.reserve_kernel(CausalTile::scratch_bytes(causal_tile_rows(config_), config_.head_dim));
  std::vector<CausalRows> decoded, prompts;
  for (const CausalRows& s : sequences) (s.decoded ? decoded : prompts).push_back(s);
  if (!decoded.empty()) run_decoded(ctx, rows, decoded);
  if (prompts.empty()) return;
  if (paired_products_ && ctx.precision == Precision::Fast && ctx.kernels.has_bf16_dot)
    run_paired(ctx, rows, prompts);
  else
    run_tasks(ctx, rows, whole_tasks(config_, prompts, 0, config_.num_key_value_heads));
}

void CausalAttention::run_tasks(Context& ctx, const QkvRows& rows, const std::vector<CausalTask>& tasks) {
  ctx.pool.parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t t = begin; t < end; ++t) {
      CausalTile tile(ctx.kernels, config_, rows.layer, tasks[t], ctx.scratch.threads[thread].kernel_bytes());
      tile.gather_queries(rows.qkv, rows.stride);
      tile.run();
      tile.scatter_output(rows.qkv, rows.stride);
    }
  });
}

void CausalAttention::run_decoded(Context& ctx, const QkvRows& rows, std::span<const CausalRows> sequences) {
  const int64_t head_dim = config_.head_dim, partial_row = head_dim + 2;
  std::vector<CausalTask> whole = whole_tasks(config_, sequences, 0, config_.num_key_value_heads), split;
  std::vector<CausalTask> tasks;
  for (const CausalTask& task : whole) {
    if (task.page_end <= kSplitPages) {
      tasks.push_back(task);
      continue;
    }
    for (int64_t page = 0; page < task.page_end; page += kSplitPages) {
      split.push_back(task);
      split.back().page_begin = page;
      split.back().page_end = std::min(page + kSplitPages, task.page_end);
    }
  }
  if (!tasks.empty()) run_tasks(ctx, rows, tasks);
  if (split.empty()) return;

  const int64_t stride = causal_tile_rows(config_) * partial_row;
  float* partial = partial_.resize(static_cast<int64_t>(split.size()) * stride);
  ctx.pool.parallel_for(static_cast<int64_t>(split.size()), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t t = begin; t < end; ++t) {
      CausalTile tile(ctx.kernels, config_, rows.layer, split[t], ctx.scratch.threads[thread].kernel_bytes());
      tile.gather_queries(rows.qkv, rows.stride);
      tile.run();
      tile.save_partial(partial + t * stride);
    }
  });
  const int64_t group = config_.num_attention_heads / config_.num_key_value_heads;
  for (size_t t = 0; t < split.size();) {
    const CausalTask& task = split[t];
    size_t pieces = 1;
    while (t + pieces < split.size() && split[t + pieces].page_begin > 0) ++pieces;
    const int64_t n = (task.token_end - task.token_begin) * group;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = task.sequence->first_row + task.token_begin + r / group;
      merge_partials(ctx.kernels, partial + static_cast<int64_t>(t) * stride + r * partial_row,
                     static_cast<int64_t>(pieces), stride, head_dim,
                     rows.qkv + row * rows.stride + (task.head * group + r % group) * head_dim);
    }
    t += pieces;
  }
}

/// The heads that the threads have in flight together are converted first, then all of their rows go through.
void CausalAttention::run_paired(Context& ctx, const QkvRows& rows, std::span<const CausalRows> sequences) {
  const int64_t kv_heads = config_.num_key_value_heads, head_dim = config_.head_dim;
  const int64_t key_dims = PairedCells::key_dims(*sequences[0].cache, rows.layer, head_dim);
  const int64_t heads_at_once = std::min<int64_t>(kv_heads, ctx.pool.size());
  struct Page {
    size_t sequence;
    int64_t index;
  };
  std::vector<Page> pages;
  std::vector<int64_t> offsets;
  int64_t elements = 0;
  for (const CausalRows& s : sequences) {
    for (int64_t page = 0; page * kPageCells < s.cells(); ++page) pages.push_back({offsets.size(), page});
    offsets.push_back(elements);
    elements += PairedCells::elements(s.cells(), head_dim, key_dims);
  }
  auto* packed = reinterpret_cast<uint16_t*>(paired_.resize((elements * heads_at_once + 1) / 2));
  const auto paired = [&](size_t sequence, int64_t head) {
    uint16_t* data = packed + head % heads_at_once * elements + offsets[sequence];
    return PairedCells(data, sequences[sequence].cells(), key_dims);
  };

  const int64_t n_pages = static_cast<int64_t>(pages.size());
  for (int64_t first = 0; first < kv_heads; first += heads_at_once) {
    const int64_t heads = std::min(heads_at_once, kv_heads - first);
    ctx.pool.parallel_for(heads * n_pages, 4, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = first + i / n_pages;
        const Page page = pages[i % n_pages];
        paired(page.sequence, head)
            .pack_page(ctx.kernels, sequences[page.sequence], page.index, rows.layer, head, head_dim);
      }
    });
    std::vector<CausalTask> tasks = whole_tasks(config_, sequences, first, first + heads);
    for (CausalTask& task : tasks)
      task.paired = paired(static_cast<size_t>(task.sequence - sequences.data()), task.head);
    run_tasks(ctx, rows, tasks);
  }
}

}  // namespace qwen2vl::cpu
