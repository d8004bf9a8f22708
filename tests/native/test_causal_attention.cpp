#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "base/half.h"
#include "cpu/causal_attention.h"
#include "kernel_testing.h"

namespace qwen2vl::cpu {
namespace {

struct Heads {
  int64_t query, key_value, head_dim;
};
struct SequenceShape {
  int64_t first_cell, rows;
};
using Batch = std::vector<SequenceShape>;

/// A pair of channels of every key-value head whose keys lie around kLarge, as a bias of it would have them.
constexpr float kLarge = 700;
constexpr int64_t kLargeDim = 3;

SplitChannels split_channels(const TextConfig& config) {
  TextWeights weights;
  weights.layers.resize(config.num_hidden_layers);
  Vector& bias = weights.layers[1].k_proj.bias;
  bias.resize(config.kv_size());
  for (int64_t at = kLargeDim; at < config.kv_size(); at += config.head_dim) bias[at] = kLarge;
  return SplitChannels(config, weights);
}

TextConfig config_of(const Heads& heads) {
  TextConfig config;
  config.num_hidden_layers = 2;
  config.num_attention_heads = heads.query;
  config.num_key_value_heads = heads.key_value;
  config.head_dim = heads.head_dim;
  return config;
}

/// Queries of a batch in layer 1 and its pages. What follows a sequence's last cell in its page is infinite,
/// as an abandoned append could leave it.
struct Problem {
  TextConfig config;
  Precision precision;
  int64_t stride, n_rows = 0;
  std::vector<Floats> keys, values;  ///< [sequence] of [cell][key-value heads * head_dim]
  std::unique_ptr<KvPages> cache;
  std::vector<std::vector<PageHandle>> pages;
  std::vector<CausalRows> sequences;
  Floats qkv;

  Problem(const Heads& heads, const Batch& batch, Precision precision_, uint32_t seed,
          bool large_keys = false)
      : config(config_of(heads)), precision(precision_), stride(config.q_size() + 2 * config.kv_size() + 3) {
    const KernelTable& kernels = *supported_kernels().back();
    const int64_t width = config.kv_size();
    const SplitChannels split = large_keys ? split_channels(config) : SplitChannels();
    cache = std::make_unique<KvPages>(config, precision, split);
    for (const SequenceShape& shape : batch) {
      const int64_t cells = shape.first_cell + shape.rows;
      keys.push_back(random_floats(cells, width, ++seed));
      if (large_keys)
        for (int64_t at = kLargeDim; at < cells * width; at += config.head_dim) keys.back()[at] += kLarge;
      values.push_back(random_floats(cells, width, ++seed));
      std::vector<PageHandle>& table = pages.emplace_back();
      for (int64_t cell = 0; cell < cells; cell += kPageCells) table.push_back(cache->make());
      for (int64_t cell = 0; cell < cells; ++cell)
        cache->write(kernels, table[cell / kPageCells], 1, cell % kPageCells,
                     keys.back().data() + cell * width, values.back().data() + cell * width);
      const Floats stale(width, std::numeric_limits<float>::infinity());
      for (int64_t cell = cells; cell % kPageCells != 0; ++cell)
        cache->write(kernels, table.back(), 1, cell % kPageCells, stale.data(), stale.data());
      sequences.push_back({cache.get(), table, n_rows, shape.rows, shape.first_cell});
      n_rows += shape.rows;
    }
    qkv = random_floats(n_rows, stride, ++seed);
  }

  double stored(float x) const {
    if (std::abs(x) > kLarge / 2) return x;  // in two parts
    return precision == Precision::Fast ? double{f16_to_f32(f32_to_f16(x))} : double{x};
  }

  /// [row][query heads * head_dim] in double precision.
  std::vector<double> expected() const {
    const int64_t head_dim = config.head_dim, width = config.kv_size();
    const int64_t group = config.num_attention_heads / config.num_key_value_heads;
    std::vector<double> out(n_rows * config.q_size());
    for (size_t s = 0; s < sequences.size(); ++s)
      for (int64_t r = 0; r < sequences[s].rows; ++r)
        for (int64_t h = 0; h < config.num_attention_heads; ++h) {
          const int64_t row = sequences[s].first_row + r, cells = sequences[s].first_cell + r + 1;
          const float* q = qkv.data() + row * stride + h * head_dim;
          double* o = out.data() + row * config.q_size() + h * head_dim;
          double sum = 0;
          for (int64_t cell = 0; cell < cells; ++cell) {
            const int64_t at = cell * width + h / group * head_dim;
            double score = 0;
            for (int64_t d = 0; d < head_dim; ++d) score += q[d] * stored(keys[s][at + d]);
            const double p = std::exp(score / std::sqrt(static_cast<double>(head_dim)));
            sum += p;
            for (int64_t d = 0; d < head_dim; ++d) o[d] += p * stored(values[s][at + d]);
          }
          for (int64_t d = 0; d < head_dim; ++d) o[d] /= sum;
        }
    return out;
  }

  /// Likewise from the kernels; checks that what is not a query stays as it was.
  Floats run(const KernelTable& kernels, int n_threads, std::span<const CausalRows> some) const {
    Context ctx(kernels, n_threads, precision);
    CausalAttention attention(config);
    Floats work = qkv, out;
    attention(ctx, 1, some, work.data(), stride);
    for (const CausalRows& s : some)
      for (int64_t row = s.first_row; row < s.first_row + s.rows; ++row) {
        const auto at = work.begin() + row * stride;
        out.insert(out.end(), at, at + config.q_size());
        CHECK(std::equal(at + config.q_size(), at + stride, qkv.begin() + row * stride + config.q_size()));
      }
    return out;
  }
  Floats run(const KernelTable& kernels, int n_threads) const { return run(kernels, n_threads, sequences); }
};

// Lone tokens, tiles cut short, page and step borders, sequences on both sides of the choice of bf16
// products.
const std::vector<Batch> kBatches = {
    {{0, 1}},
    {{63, 1}},
    {{64, 1}},
    {{700, 1}},
    {{0, 2}},
    {{61, 5}},
    {{0, 15}},
    {{0, 16}},
    {{0, 17}},
    {{47, 17}},
    {{48, 16}},
    {{0, 64}},
    {{1, 64}},
    {{0, 130}},
    {{381, 130}},
    {{512, 16}},
    {{495, 18}},
    {{1000, 33}},
    {{5, 1}, {80, 1}, {0, 1}},
    {{0, 15}, {100, 16}, {63, 1}, {255, 40}},
};
const Heads kHeads[] = {{12, 2, 128}, {7, 1, 20}, {4, 4, 80}};

/// Every batch with some of the heads, so that each pair comes up on some instruction set.
template <typename Check>
void for_cases(Precision precision, Check check, bool large_keys = false) {
  size_t turn = 0;
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const Batch& batch : kBatches) {
      const Heads& heads = kHeads[kernels->isa == "generic" ? 1 : turn++ % 3];
      CAPTURE(heads.head_dim);
      CAPTURE(batch[0].first_cell);
      CAPTURE(batch[0].rows);
      check(*kernels, Problem(heads, batch, precision, static_cast<uint32_t>(turn), large_keys));
    }
  }
}

TEST_CASE("causal attention with float32 products agrees with double precision") {
  for (const Precision precision : {Precision::Fast, Precision::Exact})
    for_cases(precision, [](const KernelTable& kernels, const Problem& problem) {
      KernelTable table = kernels;
      table.has_bf16_dot = false;
      const std::vector<double> expected = problem.expected();
      for (const int n_threads : {1, 3}) {
        const Floats actual = problem.run(table, n_threads);
        // Values are within 5; sums of a few hundred terms and exponentials lose some units in the last
        // place.
        CHECK_EQ(worst_mismatch(static_cast<int64_t>(expected.size()), actual, expected,
                                [](int64_t) { return 1e-5; }),
                 "");
      }
    });
}

TEST_CASE("causal attention with products of bf16 stays near double precision") {
  for_cases(Precision::Fast, [](const KernelTable& kernels, const Problem& problem) {
    KernelTable table = kernels;
    table.has_bf16_dot = true;
    const std::vector<double> expected = problem.expected();
    const Floats actual = problem.run(table, 2);
    // Queries, keys, probabilities and values round by 2^-9 of themselves, 2^-10 on average: the largest of
    // millions of such errors, and their mean square.
    CHECK_EQ(
        worst_mismatch(static_cast<int64_t>(expected.size()), actual, expected, [](int64_t) { return 0.03; }),
        "");
    CHECK(nmse(expected, actual) < 3e-5);
  });
}

TEST_CASE("keys of hundreds in some channels, as biases make them, cost no more than others") {
  for (const bool bf16 : {false, true}) {
    CAPTURE(bf16);
    for_cases(
        Precision::Fast,
        [&](const KernelTable& kernels, const Problem& problem) {
          KernelTable table = kernels;
          table.has_bf16_dot = bf16;
          const Floats actual = problem.run(table, 2);
          // Without the second part 1e-4 and more.
          CHECK(nmse(problem.expected(), actual) < (bf16 ? 3e-5 : 3e-8));
        },
        true);
  }
}

TEST_CASE("split channels are the pairs of the largest biases, as many of every head") {
  TextConfig config = config_of({4, 2, 20});
  config.num_hidden_layers = 3;
  TextWeights weights;
  weights.layers.resize(3);
  Vector& bias = weights.layers[1].k_proj.bias;
  bias.assign(40, 0.5f);
  bias[4] = -20;      // head 0: the pair (4, 14)
  bias[20 + 19] = 3;  // head 1 has none that is large: its largest, (9, 19)
  weights.layers[2].k_proj.bias.assign(40, 100.0f);
  const SplitChannels split(config, weights);
  CHECK(split.count(0) == 0);
  CHECK(split.of(0, 1).empty());
  const auto dims = [&](int64_t layer, int64_t head) {
    const auto of = split.of(layer, head);
    return std::vector<int32_t>(of.begin(), of.end());
  };
  CHECK(split.count(1) == 2);
  CHECK(dims(1, 0) == std::vector<int32_t>{4, 14});
  CHECK(dims(1, 1) == std::vector<int32_t>{9, 19});
  CHECK(split.count(2) == SplitChannels::kMost);
  CHECK(SplitChannels().count(0) == 0);
}

TEST_CASE("causal attention: a sequence gets the same bits alone and among others") {
  const Problem problem(kHeads[0], kBatches.back(), Precision::Fast, 77);
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    const Floats together = problem.run(*kernels, 2);
    auto begin = together.begin();
    for (const CausalRows& sequence : problem.sequences) {
      CAPTURE(sequence.rows);
      const Floats alone = problem.run(*kernels, 2, {&sequence, 1});
      CHECK(std::equal(alone.begin(), alone.end(), begin));
      begin += static_cast<int64_t>(alone.size());
    }
  }
}

TEST_CASE("pair_f16_panel pairs rows and rounds as the scalar conversions do") {
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const int64_t depth : {1, 2, 3, 63, 64, 512}) {
      std::vector<uint16_t> panel;
      for (const float x : random_floats(depth, kPanelRows, 5, true)) panel.push_back(f32_to_f16(x));
      const int64_t n = (depth + 1) / 2 * 2 * kPanelRows;
      std::vector<uint16_t> out(n + 1, 0x1234);
      kernels->pair_f16_panel(panel.data(), depth, out.data());
      for (int64_t k = 0; k < (depth + 1) / 2 * 2; ++k)
        for (int64_t r = 0; r < kPanelRows; ++r)
          REQUIRE(out[(k / 2 * kPanelRows + r) * 2 + k % 2] ==
                  (k < depth ? f32_to_bf16(f16_to_f32(panel[k * kPanelRows + r])) : 0));
      CHECK(out[n] == 0x1234);
    }
  }
}

TEST_CASE("gemm_f16_ahead gives what gemm_f16 gives") {
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const int64_t rows : {1, 6, 7, 16})
      for (const int64_t n : {1, 16, 64, 80, 130}) {
        constexpr int64_t kDepth = 80;
        const Floats a = random_floats(rows, kDepth, 8);
        std::vector<uint16_t> b;
        for (const float x : random_floats((n + 15) / 16, kDepth * kPanelRows, 9)) b.push_back(f32_to_f16(x));
        const std::vector<uint16_t> next = b;
        Floats plain(rows * n, 1.0f), ahead = plain;
        kernels->gemm_f16(a.data(), kDepth, b.data(), kDepth * kPanelRows, rows, n, kDepth,
                          {plain.data(), n, nullptr, Store::Accumulate});
        kernels->gemm_f16_ahead(a.data(), kDepth, b.data(), kDepth * kPanelRows, rows, n, kDepth,
                                {ahead.data(), n, nullptr, Store::Accumulate}, next.data());
        CHECK(plain == ahead);
      }
  }
}

}  // namespace
}  // namespace qwen2vl::cpu
