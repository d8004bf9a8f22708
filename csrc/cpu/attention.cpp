#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace qwen2vl::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

int64_t panels(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }

/// Queries of a tile and their running result. Lives in a thread's scratch.
struct Tile {
  float* queries = nullptr;  ///< [rows][head_dim], causal attention only
  float* scores = nullptr;   ///< [rows][keys]
  float* output = nullptr;   ///< [rows][head_dim]
  float* maximum = nullptr;  ///< [rows]
  float* sum = nullptr;      ///< [rows]

  static size_t bytes(int64_t rows, int64_t keys, int64_t head_dim) {
    return static_cast<size_t>(rows) * (keys + 2 * head_dim + 2) * sizeof(float);
  }
  Tile(std::byte* scratch, int64_t rows, int64_t keys, int64_t head_dim) {
    scores = reinterpret_cast<float*>(scratch);
    output = scores + rows * keys;
    queries = output + rows * head_dim;
    maximum = queries + rows * head_dim;
    sum = maximum + rows;
  }
  void start(int64_t rows, int64_t head_dim) {
    std::memset(output, 0, static_cast<size_t>(rows * head_dim) * sizeof(float));
    std::fill_n(maximum, rows, kMinusInfinity);
    std::fill_n(sum, rows, 0.0f);
  }
};

// --- full attention
// ------------------------------------------------------------------------------------------

// 96 rows use each key and value that is loaded 96 times. Tiles of 96 x 512 scores in float32 and as
// probabilities in bf16 (290 KB), with 512 keys and values of head_dim 80 in bf16 (160 KB), stay in a
// second-level cache of 512 KB; in float32 half as many keys do.
constexpr int64_t kTileRows = 96;

/// Keys and values of one head in panels, as float32 or as pairs of bf16 (see KernelTable).
template <typename T>
struct HeadPanels {
  static constexpr bool kBf16 = std::is_same_v<T, uint16_t>;
  static constexpr int64_t kTileKeys = kBf16 ? 512 : 256;

  T* keys = nullptr;    // [ceil(rows / 16)] panels of head_dim x 16 keys
  T* values = nullptr;  // [ceil(head_dim / 16)] panels of (rows, made even) x 16 dims

  static int64_t even(int64_t n) { return n + n % 2; }
  static int64_t key_elements(int64_t rows, int64_t head_dim) { return panels(rows) * kPanelRows * head_dim; }
  static int64_t value_elements(int64_t rows, int64_t head_dim) {
    return panels(head_dim) * kPanelRows * even(rows);
  }
};

void pack_head(const KernelTable&, const float* k, const float* v, int64_t stride, int64_t rows,
               int64_t head_dim, const HeadPanels<float>& out) {
  const int64_t value_panel = HeadPanels<float>::even(rows) * kPanelRows;
  for (int64_t r = 0; r < rows; ++r) {
    float* key = out.keys + r / kPanelRows * head_dim * kPanelRows + r % kPanelRows;
    for (int64_t d = 0; d < head_dim; ++d) key[d * kPanelRows] = k[r * stride + d];
    for (int64_t d = 0; d < head_dim; d += kPanelRows)
      std::memcpy(out.values + d / kPanelRows * value_panel + r * kPanelRows, v + r * stride + d,
                  std::min(kPanelRows, head_dim - d) * sizeof(float));
  }
}

void pack_head(const KernelTable& kernels, const float* k, const float* v, int64_t stride, int64_t rows,
               int64_t head_dim, const HeadPanels<uint16_t>& out) {
  const int64_t value_panel = HeadPanels<uint16_t>::even(rows) * kPanelRows;
  std::vector<uint16_t> row(head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    kernels.convert_f32_to_bf16(k + r * stride, row.data(), head_dim);
    uint16_t* key = out.keys + r / kPanelRows * head_dim * kPanelRows + r % kPanelRows * 2;
    for (int64_t d = 0; d < head_dim; d += 2) std::memcpy(key + d * kPanelRows, row.data() + d, 4);
    kernels.convert_f32_to_bf16(v + r * stride, row.data(), head_dim);
    uint16_t* value = out.values + r / 2 * 2 * kPanelRows + r % 2;
    for (int64_t d = 0; d < head_dim; ++d) value[d / kPanelRows * value_panel + d % kPanelRows * 2] = row[d];
  }
}

/// Queries [rows] of one head against all of its keys; the result replaces them.
template <typename T>
class FullTile {
 public:
  static size_t scratch_bytes(int64_t head_dim) {
    return Tile::bytes(kTileRows, HeadPanels<T>::kTileKeys, head_dim) +
           kTileRows * (HeadPanels<T>::kTileKeys + head_dim) * sizeof(uint16_t);
  }

  FullTile(const KernelTable& kernels, int64_t head_dim, std::byte* scratch)
      : kernels_(kernels), head_dim_(head_dim), tile_(scratch, kTileRows, kKeys, head_dim) {
    probabilities_ = reinterpret_cast<uint16_t*>(scratch + Tile::bytes(kTileRows, kKeys, head_dim));
    queries_ = probabilities_ + kTileRows * kKeys;
  }

  void operator()(float* queries, int64_t stride, int64_t rows, int64_t n_keys, const HeadPanels<T>& head) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
    tile_.start(rows, head_dim_);
    if constexpr (kBf16)
      for (int64_t r = 0; r < rows; ++r)
        kernels_.convert_f32_to_bf16(queries + r * stride, queries_ + r * head_dim_, head_dim_);
    for (int64_t key = 0; key < n_keys; key += kKeys) {
      const int64_t n = std::min(kKeys, n_keys - key);
      multiply_keys(queries, stride, rows, n, head.keys + key * head_dim_);
      for (int64_t r = 0; r < rows; ++r) {
        float* scores = tile_.scores + r * kKeys;
        const float factor = kernels_.softmax_step(scores, n, scale, tile_.maximum + r, tile_.sum + r);
        if (factor != 1.0f) kernels_.scale_row(tile_.output + r * head_dim_, factor, head_dim_);
        if constexpr (kBf16) {
          kernels_.convert_f32_to_bf16(scores, probabilities_ + r * kKeys, n);
          if (n % 2 != 0) probabilities_[r * kKeys + n] = 0;
        }
      }
      multiply_values(rows, n, head.values + key * kPanelRows, HeadPanels<T>::even(n_keys) * kPanelRows);
    }
    for (int64_t r = 0; r < rows; ++r) {
      kernels_.scale_row(tile_.output + r * head_dim_, 1.0f / tile_.sum[r], head_dim_);
      std::memcpy(queries + r * stride, tile_.output + r * head_dim_, head_dim_ * sizeof(float));
    }
  }

 private:
  static constexpr bool kBf16 = HeadPanels<T>::kBf16;
  static constexpr int64_t kKeys = HeadPanels<T>::kTileKeys;

  void multiply_keys(const float* queries, int64_t stride, int64_t rows, int64_t n, const T* keys) {
    const MatmulOutput out{tile_.scores, kKeys, nullptr, Store::Overwrite};
    if constexpr (kBf16)
      kernels_.gemm_bf16_pairs(queries_, head_dim_, keys, head_dim_ * kPanelRows, rows, n, head_dim_, out);
    else
      kernels_.gemm_f32(queries, stride, keys, head_dim_ * kPanelRows, rows, n, head_dim_, out);
  }

  void multiply_values(int64_t rows, int64_t n, const T* values, int64_t value_panel) {
    const MatmulOutput out{tile_.output, head_dim_, nullptr, Store::Accumulate};
    if constexpr (kBf16)
      kernels_.gemm_bf16_pairs(probabilities_, kKeys, values, value_panel, rows, head_dim_,
                               HeadPanels<T>::even(n), out);
    else
      kernels_.gemm_f32(tile_.scores, kKeys, values, value_panel, rows, head_dim_, n, out);
  }

  const KernelTable& kernels_;
  int64_t head_dim_;
  Tile tile_;
  uint16_t* probabilities_;  // [rows][keys]
  uint16_t* queries_;        // [rows][head_dim]
};

}  // namespace

void FullAttention::operator()(Context& ctx, float* qkv, int64_t rows) {
  const double products = 4.0 * static_cast<double>(rows * rows * num_heads_ * head_dim_);
  const auto stage = ctx.profile.stage("image attention", {0, products, 0});
  if (ctx.precision == Precision::Fast && ctx.kernels.has_bf16_dot)
    run<uint16_t>(ctx, qkv, rows);
  else
    run<float>(ctx, qkv, rows);
}

template <typename T>
void FullAttention::run(Context& ctx, float* qkv, int64_t rows) {
  const int64_t width = num_heads_ * head_dim_, stride = 3 * width;
  const int64_t key_size = HeadPanels<T>::key_elements(rows, head_dim_);
  const int64_t value_size = HeadPanels<T>::value_elements(rows, head_dim_);
  const int64_t heads_at_once = std::min<int64_t>(num_heads_, ctx.pool.size());
  const int64_t elements = (key_size + value_size) * heads_at_once;
  T* packed = reinterpret_cast<T*>(packed_.resize((elements * static_cast<int64_t>(sizeof(T)) + 3) / 4));
  std::memset(packed, 0, elements * sizeof(T));  // what fills up the last panels
  ctx.reserve_scratch(FullTile<T>::scratch_bytes(head_dim_));
  const auto panels_of = [&](int64_t h) {
    T* keys = packed + h * (key_size + value_size);
    return HeadPanels<T>{keys, keys + key_size};
  };

  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t first = 0; first < num_heads_; first += heads_at_once) {
    const int64_t heads = std::min(heads_at_once, num_heads_ - first);
    ctx.pool.parallel_for(heads, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t h = begin; h < end; ++h) {
        const float* k = qkv + width + (first + h) * head_dim_;
        pack_head(ctx.kernels, k, k + width, stride, rows, head_dim_, panels_of(h));
      }
    });
    ctx.pool.parallel_for(heads * tiles, 1, [&](int64_t begin, int64_t end, int thread) {
      FullTile<T> tile(ctx.kernels, head_dim_, ctx.scratch(thread));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t h = t / tiles, row = t % tiles * kTileRows;
        tile(qkv + row * stride + (first + h) * head_dim_, stride, std::min(kTileRows, rows - row), rows,
             panels_of(h));
      }
    });
  }
}

// --- causal attention
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
