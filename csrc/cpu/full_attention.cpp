#include "cpu/full_attention.h"

#include <algorithm>

#include "cpu/float_tile.h"
#include "cpu/integer_tile.h"

namespace qwen2vl::cpu {
namespace {

// A piece: so many dot products' terms of queries and keys (twice as many multiplications with the values'
// take a hundredth to a tenth of a second), but enough tasks for every thread that the last ones weigh
// little.
constexpr int64_t kProducts = int64_t{1} << 31;
constexpr int64_t kTasks = 8;

}  // namespace

Pieces FullAttention::operator()(Context& ctx, float* qkv, int64_t rows, const Rotation& rotation) {
  if (ctx.precision == Precision::Exact || !ctx.kernels.has_i16_dot)
    return run<FloatTile>(ctx, qkv, rows, rotation);
  if (ctx.kernels.has_u8_dot && value_bits_ == ValueBits::Eight)
    return run<IntegerTile<int8_t>>(ctx, qkv, rows, rotation);
  return run<IntegerTile<int16_t>>(ctx, qkv, rows, rotation);
}

template <typename Tile>
Pieces FullAttention::run(Context& ctx, float* qkv, int64_t rows, const Rotation& rotation) {
  const FullRows x{qkv, rows, num_heads_, head_dim_, rotation};
  const double products = 4.0 * static_cast<double>(rows * rows * x.width());
  const auto stage = [&](double share) {
    return ctx.profile.stage("image attention", {0, share * products, 0});
  };
  typename Tile::Heads heads(packed_, x);
  {
    const auto counted = stage(0);
    heads.pack(ctx, x);
  }

  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, n_tasks = num_heads_ * tiles;
  const int64_t of_a_piece = std::max(kTasks * ctx.pool.size(), kProducts / (kTileRows * rows * head_dim_));
  for (int64_t first = 0; first < n_tasks; first += of_a_piece) {
    co_yield 0;
    const int64_t n = std::min(of_a_piece, n_tasks - first);
    const auto counted = stage(static_cast<double>(n) / static_cast<double>(n_tasks));
    ctx.scratch.reserve_kernel(Tile::scratch_bytes(head_dim_));
    ctx.pool.parallel_for(n, 1, [&](int64_t begin, int64_t end, int thread) {
      Tile tile(ctx.kernels, head_dim_, ctx.scratch.threads[thread].kernel_bytes());
      for (int64_t t = first + begin; t < first + end; ++t) {
        const int64_t row = t % tiles * kTileRows;
        tile(x, heads, t / tiles, row, std::min(kTileRows, rows - row));
      }
    });
  }
}

}  // namespace qwen2vl::cpu
