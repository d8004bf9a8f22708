#include "cpu/causal_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/half.h"
#include "cpu/attention_tile.h"

namespace qwen2vl::cpu {
namespace {

// About as many rows as a full-attention tile, whole tokens of all query heads of a key-value head.
constexpr int64_t kCausalTileRows = 96;
// Cells between two steps of the softmax, in both arithmetics: 96 x 256 scores and probabilities with their
// keys and values stay in a second-level cache of 512 KB.
constexpr int64_t kStepCells = 8 * kPageCells;
// Cells whose values, 32 KB in bf16 at head_dim 128, stay in the first-level cache for all rows of a tile.
constexpr int64_t kValueCells = 4 * kPageCells;
// Pages of a decoded token's task: half a megabyte of keys and values at head_dim 128.
constexpr int64_t kSplitPages = 16;
// Up to so many rows wait for memory, more for arithmetic.
constexpr int64_t kAheadRows = 16;

/// The cache of one sequence and key-value head as pairs of bf16 (see KernelTable). Behind a key's dimensions
/// stand those that the cache has split, first what rounding to bf16 leaves of them, then themselves again:
/// for the queries' rounded values and for what their rounding leaves.
struct PairedCells {
  uint16_t* keys = nullptr;    ///< [cell / 16][key_dims / 2][16 cells][2]
  uint16_t* values = nullptr;  ///< [cell / kValueCells][ceil(head_dim / 16)][kValueCells / 2][16 dims][2]

  static constexpr int64_t kValuePanel = kValueCells * kPanelRows;
  static int64_t blocks(int64_t cells) { return (cells + kValueCells - 1) / kValueCells; }
  static int64_t key_dims(const KvPages& cache, int64_t layer, int64_t head_dim) {
    return 2 * cache.key_dims(layer) - head_dim;
  }
  static int64_t key_elements(int64_t cells, int64_t key_dims) {
    return blocks(cells) * kValueCells * key_dims;
  }
  static int64_t elements(int64_t cells, int64_t head_dim, int64_t key_dims) {
    return key_elements(cells, key_dims) + blocks(cells) * panels(head_dim) * kValuePanel;
  }
  PairedCells() = default;
  PairedCells(uint16_t* data, int64_t cells, int64_t key_dims)
      : keys(data), values(data + key_elements(cells, key_dims)) {}

  /// Keys of a page whole (what lies beyond the last cell is never looked at), values up to the last cell.
  void pack_page(const KernelTable& kernels, const CausalRows& sequence, int64_t page, int64_t layer,
                 int64_t head, int64_t head_dim) const {
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

 private:
  static void pack_split(const uint16_t* panel, std::span<const int32_t> split, int64_t head_dim,
                         uint16_t* pairs) {
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
};

int64_t tile_tokens(const TextConfig& config) {
  const int64_t group = config.num_attention_heads / config.num_key_value_heads;
  return std::max<int64_t>(1, kCausalTileRows / group);
}

int64_t tile_rows(const TextConfig& config) {
  return tile_tokens(config) * (config.num_attention_heads / config.num_key_value_heads);
}

}  // namespace

/// Some query tokens of one key-value head against some pages.
struct CausalTask {
  const CausalRows* sequence;
  int64_t head;                    ///< key-value head
  int64_t token_begin, token_end;  ///< within the sequence's rows
  int64_t page_begin, page_end;
  PairedCells paired = {};  ///< where the products are of bf16
};

namespace {

class CausalTile {
 public:
  static size_t scratch_bytes(int64_t rows, int64_t head_dim) {
    const int64_t key_dims = head_dim + 2 * SplitChannels::kMost;
    return Tile::bytes(rows, kStepCells, head_dim, key_dims) +
           static_cast<size_t>(rows * (kStepCells + key_dims)) * sizeof(uint16_t);
  }

  CausalTile(const KernelTable& kernels, const TextConfig& config, int64_t layer, const CausalTask& task,
             std::byte* scratch)
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

  void gather_queries(const float* qkv, int64_t stride) {
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

  void run() {
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
  bool paired() const { return task_.paired.keys != nullptr; }

  /// How many cells a token sees: those up to its own.
  int64_t visible(int64_t token) const { return task_.sequence->first_cell + token + 1; }

  const float* query(const float* qkv, int64_t stride, int64_t r) const {
    const int64_t row = task_.sequence->first_row + task_.token_begin + r / group_;
    return qkv + row * stride + (task_.head * group_ + r % group_) * head_dim_;
  }

  /// softmax(begin, end, n) for each token's rows and the n of `cells` from `cell` that they see, if
  /// any; then clear(row, n) for each row.
  template <typename Softmax, typename Clear>
  void for_tokens(int64_t cell, int64_t cells, const Softmax& softmax, const Clear& clear) {
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

  /// Products of bf16 pairs with the n cells from `cell`.
  void paired_step(int64_t cell, int64_t n) {
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

  /// float32 products with the n cells from `cell`, page by page as the cache holds them.
  void step(int64_t cell, int64_t n) {
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

  /// `ahead`: the panels of the next call.
  void gemm(const float* a, int64_t a_stride, const uint8_t* b, int64_t panel, int64_t n_cols, int64_t depth,
            const MatmulOutput& out, const uint8_t* ahead) const {
    const auto* b16 = reinterpret_cast<const uint16_t*>(b);
    if (!task_.sequence->cache->half())
      kernels_.gemm_f32(a, a_stride, reinterpret_cast<const float*>(b), panel, rows_, n_cols, depth, out);
    else if (rows_ > kAheadRows)
      kernels_.gemm_f16(a, a_stride, b16, panel, rows_, n_cols, depth, out);
    else
      kernels_.gemm_f16_ahead(a, a_stride, b16, panel, rows_, n_cols, depth, out,
                              reinterpret_cast<const uint16_t*>(ahead));
  }

  const KernelTable& kernels_;
  int64_t head_dim_, group_, layer_;
  const CausalTask& task_;
  std::span<const int32_t> split_;
  int64_t key_dims_;
  int64_t rows_;
  Tile tile_;
  uint16_t* probabilities_;   // [rows][kStepCells], paired only
  uint16_t* paired_queries_;  // [rows][key_dims], likewise
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

/// Tasks of whole tiles for the key-value heads [head_begin, head_end), those with the most cells first so
/// that the threads end together.
std::vector<CausalTask> whole_tasks(const TextConfig& config, std::span<const CausalRows> sequences,
                                    int64_t head_begin, int64_t head_end) {
  const int64_t tokens = tile_tokens(config);
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
  const Rows rows{layer, qkv, qkv_stride};
  ctx.scratch.reserve_kernel(CausalTile::scratch_bytes(tile_rows(config_), config_.head_dim));
  std::vector<CausalRows> decoded, prompts;
  for (const CausalRows& s : sequences) (s.decoded ? decoded : prompts).push_back(s);
  if (!decoded.empty()) run_decoded(ctx, rows, decoded);
  if (prompts.empty()) return;
  if (paired_products_ && ctx.precision == Precision::Fast && ctx.kernels.has_bf16_dot)
    run_paired(ctx, rows, prompts);
  else
    run_tasks(ctx, rows, whole_tasks(config_, prompts, 0, config_.num_key_value_heads));
}

void CausalAttention::run_tasks(Context& ctx, const Rows& rows, const std::vector<CausalTask>& tasks) {
  ctx.pool.parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t t = begin; t < end; ++t) {
      CausalTile tile(ctx.kernels, config_, rows.layer, tasks[t], ctx.scratch.threads[thread].kernel_bytes());
      tile.gather_queries(rows.qkv, rows.stride);
      tile.run();
      tile.scatter_output(rows.qkv, rows.stride);
    }
  });
}

void CausalAttention::run_decoded(Context& ctx, const Rows& rows, std::span<const CausalRows> sequences) {
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

  const int64_t stride = tile_rows(config_) * partial_row;
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
void CausalAttention::run_paired(Context& ctx, const Rows& rows, std::span<const CausalRows> sequences) {
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
