#include "cpu/full_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/attention_tile.h"

namespace qwen2vl::cpu {
namespace {

// 100 rows use each key and value that is loaded 100 times. Their probabilities (100 KB for 512 keys in
// bf16), with 512 keys and values of head_dim 80 in bf16 (160 KB), stay in a second-level cache of 512 KB; in
// float32 half as many keys do.
constexpr int64_t kTileRows = 100;
// Values of so many keys (20 KB with head_dim 80) stay in a first-level cache while all rows pass.
constexpr int64_t kNearKeys = 128;
// The scores of so many rows (20 KB) stay there until they are probabilities.
constexpr int64_t kNearRows = 10;
// A piece: so many dot products' terms of queries and keys (twice as many multiplications with the values'
// take a hundredth to a tenth of a second), but enough tasks for every thread that the last ones weigh
// little.
constexpr int64_t kProducts = int64_t{1} << 31;
constexpr int64_t kTasks = 8;

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

/// One head's row, turned.
void rotate(const KernelTable& kernels, const float* x, const Rotation& rotation, int64_t row,
            int64_t head_dim, float* out) {
  const int64_t half = head_dim / 2;
  std::memcpy(out, x, head_dim * sizeof(float));
  kernels.rope(out, rotation.cos.data() + row * half, rotation.sin.data() + row * half, half);
}

/// Rows [begin, begin + n) of one head, n <= 16 and begin a multiple of it, to its panels: keys k
/// [n][head_dim], values v [n][v_stride]. What fills up the last panels is zero.
void pack_rows(const KernelTable&, const float* k, const float* v, int64_t v_stride, int64_t begin, int64_t n,
               int64_t rows, int64_t head_dim, const HeadPanels<float>& out) {
  float* key = out.keys + begin * head_dim;
  for (int64_t d = 0; d < head_dim; ++d)
    for (int64_t r = 0; r < kPanelRows; ++r) key[d * kPanelRows + r] = r < n ? k[r * head_dim + d] : 0.0f;
  const int64_t value_panel = HeadPanels<float>::even(rows) * kPanelRows;
  for (int64_t d = 0; d < head_dim; d += kPanelRows) {
    const int64_t dims = std::min(kPanelRows, head_dim - d);
    float* value = out.values + d / kPanelRows * value_panel + begin * kPanelRows;
    std::memset(value, 0, HeadPanels<float>::even(n) * kPanelRows * sizeof(float));
    for (int64_t r = 0; r < n; ++r)
      std::memcpy(value + r * kPanelRows, v + r * v_stride + d, dims * sizeof(float));
  }
}

void pack_rows(const KernelTable& kernels, const float* k, const float* v, int64_t v_stride, int64_t begin,
               int64_t n, int64_t rows, int64_t head_dim, const HeadPanels<uint16_t>& out) {
  const int64_t width = panels(head_dim) * kPanelRows;
  std::vector<uint16_t> rounded(kPanelRows * width);
  const auto round_rows = [&](const float* x, int64_t stride) {
    for (int64_t r = 0; r < n; ++r)
      kernels.convert_f32_to_bf16(x + r * stride, rounded.data() + r * width, head_dim);
  };
  round_rows(k, head_dim);
  // Four pairs of every row at a time: 16 bytes are one load.
  uint16_t* key = out.keys + begin * head_dim;
  for (int64_t d = 0; d < head_dim; d += 8) {
    const int64_t pairs = std::min<int64_t>(4, (head_dim - d) / 2);
    uint32_t block[4][kPanelRows];
    for (int64_t r = 0; r < kPanelRows; ++r) {
      uint32_t row[4];
      std::memcpy(row, rounded.data() + r * width + d, sizeof row);
      for (int64_t i = 0; i < 4; ++i) block[i][r] = row[i];
    }
    std::memcpy(key + d * kPanelRows, block, pairs * sizeof block[0]);
  }
  round_rows(v, v_stride);
  const int64_t value_panel = HeadPanels<uint16_t>::even(rows) * kPanelRows;
  for (int64_t d = 0; d < head_dim; d += kPanelRows)
    for (int64_t r = 0; r < n; r += 2) {
      const uint16_t* pair = rounded.data() + r * width + d;
      uint16_t* value = out.values + d / kPanelRows * value_panel + (begin + r) * kPanelRows;
      for (int64_t i = 0; i < kPanelRows; ++i) {
        value[2 * i] = pair[i];
        value[2 * i + 1] = pair[width + i];
      }
    }
}

/// Queries [rows] of one head against all of its keys; the result replaces them.
template <typename T>
class FullTile {
 public:
  static size_t scratch_bytes(int64_t head_dim) {
    return Tile::bytes(kTileRows, HeadPanels<T>::kTileKeys, head_dim, head_dim) +
           kTileRows * (HeadPanels<T>::kTileKeys + head_dim) * sizeof(uint16_t);
  }

  FullTile(const KernelTable& kernels, int64_t head_dim, std::byte* scratch)
      : kernels_(kernels), head_dim_(head_dim), tile_(scratch, kTileRows, kKeys, head_dim, head_dim) {
    probabilities_ = reinterpret_cast<uint16_t*>(scratch + Tile::bytes(kTileRows, kKeys, head_dim, head_dim));
    queries_ = probabilities_ + kTileRows * kKeys;
  }

  /// `first_row`: the queries' place among all rows.
  void operator()(float* queries, int64_t stride, int64_t rows, const Rotation& rotation, int64_t first_row,
                  int64_t n_keys, const HeadPanels<T>& head) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
    tile_.start(rows, head_dim_);
    for (int64_t r = 0; r < rows; ++r) {
      float* query = tile_.queries + r * head_dim_;
      rotate(kernels_, queries + r * stride, rotation, first_row + r, head_dim_, query);
      if constexpr (kBf16) kernels_.convert_f32_to_bf16(query, queries_ + r * head_dim_, head_dim_);
    }
    for (int64_t key = 0; key < n_keys; key += kKeys) {
      const int64_t n = std::min(kKeys, n_keys - key);
      for (int64_t begin = 0; begin < rows; begin += kNearRows) {
        const int64_t end = std::min(begin + kNearRows, rows);
        multiply_keys(begin, end, n, head.keys + key * head_dim_);
        softmax(begin, end, n, scale);
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

  /// In bf16 a row's scores are not needed any more when its probabilities are there.
  float* scores(int64_t row) const { return tile_.scores + (kBf16 ? row % kNearRows : row) * kKeys; }

  void multiply_keys(int64_t begin, int64_t end, int64_t n, const T* keys) {
    const MatmulOutput out{scores(begin), kKeys, nullptr, Store::Overwrite};
    if constexpr (kBf16)
      kernels_.gemm_bf16_pairs(queries_ + begin * head_dim_, head_dim_, keys, head_dim_ * kPanelRows,
                               end - begin, n, head_dim_, out);
    else
      kernels_.gemm_f32(tile_.queries + begin * head_dim_, head_dim_, keys, head_dim_ * kPanelRows,
                        end - begin, n, head_dim_, out);
  }

  void softmax(int64_t begin, int64_t end, int64_t n, float scale) {
    float* factors = tile_.factors;
    if constexpr (kBf16) {
      uint16_t* probabilities = probabilities_ + begin * kKeys;
      kernels_.softmax_steps_bf16(scores(begin), kKeys, end - begin, n, scale, tile_.maximum + begin,
                                  tile_.sum + begin, factors + begin, probabilities, kKeys);
      if (n % 2 != 0)
        for (int64_t r = 0; r < end - begin; ++r) probabilities[r * kKeys + n] = 0;
    } else {
      for (int64_t r = begin; r < end; ++r)
        factors[r] = kernels_.softmax_step(scores(r), n, scale, tile_.maximum + r, tile_.sum + r);
    }
    for (int64_t r = begin; r < end; ++r)
      if (factors[r] != 1.0f) kernels_.scale_row(tile_.output + r * head_dim_, factors[r], head_dim_);
  }

  void multiply_values(int64_t rows, int64_t n, const T* values, int64_t value_panel) {
    const MatmulOutput out{tile_.output, head_dim_, nullptr, Store::Accumulate};
    if constexpr (kBf16)
      for (int64_t key = 0; key < HeadPanels<T>::even(n); key += kNearKeys)
        kernels_.gemm_bf16_pairs(probabilities_ + key, kKeys, values + key * kPanelRows, value_panel, rows,
                                 head_dim_, std::min(kNearKeys, HeadPanels<T>::even(n) - key), out);
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

Pieces FullAttention::operator()(Context& ctx, float* qkv, int64_t rows, const Rotation& rotation) {
  if (ctx.precision == Precision::Fast && ctx.kernels.has_bf16_dot)
    return run<uint16_t>(ctx, qkv, rows, rotation);
  return run<float>(ctx, qkv, rows, rotation);
}

template <typename T>
Pieces FullAttention::run(Context& ctx, float* qkv, int64_t rows, const Rotation& rotation) {
  const int64_t width = num_heads_ * head_dim_, stride = 3 * width;
  const int64_t key_size = HeadPanels<T>::key_elements(rows, head_dim_);
  const int64_t value_size = HeadPanels<T>::value_elements(rows, head_dim_);
  T* packed = reinterpret_cast<T*>(
      packed_.resize(((key_size + value_size) * num_heads_ * static_cast<int64_t>(sizeof(T)) + 3) / 4));
  const auto panels_of = [&](int64_t h) {
    T* keys = packed + h * (key_size + value_size);
    return HeadPanels<T>{keys, keys + key_size};
  };
  const double products = 4.0 * static_cast<double>(rows * rows * width);
  const auto stage = [&](double share) {
    return ctx.profile.stage("image attention", {0, share * products, 0});
  };

  // All heads of a row before the next row: rows are long, and a head's share of one is a few cache lines.
  const auto pack = [&](int64_t begin, int64_t end, int) {
    std::vector<float> keys(kPanelRows * head_dim_);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = p * kPanelRows, n = std::min(kPanelRows, rows - row);
      const float* k = qkv + row * stride + width;
      for (int64_t h = 0; h < num_heads_; ++h, k += head_dim_) {
        for (int64_t r = 0; r < n; ++r)
          rotate(ctx.kernels, k + r * stride, rotation, row + r, head_dim_, keys.data() + r * head_dim_);
        pack_rows(ctx.kernels, keys.data(), k + width, stride, row, n, rows, head_dim_, panels_of(h));
      }
    }
  };
  {
    const auto counted = stage(0);
    ctx.pool.parallel_for(panels(rows), 4, pack);
  }

  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, n_tasks = num_heads_ * tiles;
  const int64_t of_a_piece = std::max(kTasks * ctx.pool.size(), kProducts / (kTileRows * rows * head_dim_));
  for (int64_t first = 0; first < n_tasks; first += of_a_piece) {
    co_yield 0;
    const int64_t n = std::min(of_a_piece, n_tasks - first);
    const auto counted = stage(static_cast<double>(n) / static_cast<double>(n_tasks));
    ctx.scratch.reserve_kernel(FullTile<T>::scratch_bytes(head_dim_));
    ctx.pool.parallel_for(n, 1, [&](int64_t begin, int64_t end, int thread) {
      FullTile<T> tile(ctx.kernels, head_dim_, ctx.scratch.threads[thread].kernel_bytes());
      for (int64_t t = first + begin; t < first + end; ++t) {
        const int64_t h = t / tiles, row = t % tiles * kTileRows;
        tile(qkv + row * stride + h * head_dim_, stride, std::min(kTileRows, rows - row), rotation, row, rows,
             panels_of(h));
      }
    });
  }
}

}  // namespace qwen2vl::cpu
