// Layers with low-rank updates: what is added, and that it is a row's own.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/linear.h"
#include "kernel_testing.h"

namespace qwen2vl::cpu {
namespace {

constexpr int64_t kCols = 2304;  // more than are multiplied at a time

/// A layer of a file, with an update where `rank` is not 0.
struct Source {
  TestMatrix matrix;
  LowRankUpdate update;

  Source(DType type, int64_t rows, int64_t rank, uint32_t seed, float size = 1)
      : matrix(type, rows, kCols, seed), update{rank, {}, {}} {
    const Floats a = random_floats(rank, kCols, seed + 1), b = random_floats(rows, rank, seed + 2);
    for (const float value : a) update.a.push_back(value);
    for (const float value : b) update.b.push_back(size * value);
  }
  LinearWeights weights(bool updated = true) const {
    const PanelMatrix& p = matrix.panels;
    return {{p.type, p.rows, p.cols, matrix.blocks.data(), nullptr}, {}, updated ? update : LowRankUpdate{}};
  }
  double added(const float* x, int64_t row) const {
    double sum = 0;
    for (int64_t r = 0; r < update.rank; ++r) {
      double inner = 0;
      for (int64_t k = 0; k < kCols; ++k) inner += double{x[k]} * update.a[r * kCols + k];
      sum += inner * update.b[row * update.rank + r];
    }
    return sum;
  }
};

Floats run(Context& ctx, const PackedLinear& layer, const Floats& x, int64_t first, int64_t rows,
           int64_t decoded = 0) {
  Floats out(rows * layer.out_features);
  linear(ctx, layer, {x.data() + first * kCols, rows, kCols, decoded}, out.data(), layer.out_features,
         Store::Overwrite);
  return out;
}

}  // namespace

TEST_CASE("updates add their products, each part its own") {
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      for (const float size : {1.0f, 1e-6f, 1e6f}) {
        CAPTURE(size);
        const Source parts[] = {
            {DType::Q4_0, 50, 5, 1, size}, {DType::Q8_0, 34, 0, 2}, {DType::F16, 20, 40, 3, size}};
        const LinearWeights with[] = {parts[0].weights(), parts[1].weights(), parts[2].weights()};
        const LinearWeights without[] = {parts[0].weights(false), parts[1].weights(),
                                         parts[2].weights(false)};
        Context ctx(*kernels, 2, precision);
        const PackedLinear layer = pack_linear("test", {&with[0], &with[1], &with[2]}, ctx);
        const PackedLinear plain = pack_linear("test", {&without[0], &without[1], &without[2]}, ctx);
        const int64_t rows = 19;
        const Floats x = random_floats(rows, kCols, 4);
        const Floats found = run(ctx, layer, x, 0, rows), base = run(ctx, plain, x, 0, rows);
        for (int64_t p = 0; p < 3; ++p) {
          double error = 0, energy = 0, outputs = 0;
          for (int64_t m = 0; m < rows; ++m)
            for (int64_t n = 0; n < parts[p].matrix.panels.rows; ++n) {
              const int64_t at = m * layer.out_features + layer.parts[p].column + n;
              const double added = parts[p].added(x.data() + m * kCols, n);
              error += std::pow(double{found[at]} - double{base[at]} - added, 2);
              energy += added * added;
              outputs += double{found[at]} * found[at];
            }
          // f16's factors lose 2^-23 of the energy at most, the sums float32's last places.
          CHECK(error <= (precision == Precision::Exact ? 1e-11 : 2e-7) * energy + 1e-13 * outputs);
        }
      }
    }
  }
}

TEST_CASE("an update's row does not depend on the others, nor on threads") {
  const int64_t rows = 530;
  const Source source(DType::Q4_0, 50, 20, 5);
  const LinearWeights weights = source.weights();
  const Floats x = random_floats(rows, kCols, 6);
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    Context ctx(*kernels, 3, Precision::Fast), alone(*kernels, 1, Precision::Fast);
    const PackedLinear layer = pack_linear("test", {&weights}, ctx);
    const PackedLinear other = pack_linear("test", {&weights}, alone);
    const int64_t n = layer.out_features;
    const Floats all = run(ctx, layer, x, 0, rows), decoded = run(ctx, layer, x, 0, rows, rows);
    const Floats mixed = run(ctx, layer, x, 0, rows, 7);
    CHECK(std::equal(mixed.begin(), mixed.begin() + 7 * n, decoded.begin()));
    CHECK(std::equal(mixed.begin() + 7 * n, mixed.end(), all.begin() + 7 * n));
    for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 1}, {3, 17}, {511, 2}, {100, 40}}) {
      CHECK(std::ranges::equal(run(alone, other, x, first, count),
                               std::span(all).subspan(first * n, count * n)));
      CHECK(std::ranges::equal(run(alone, other, x, first, count, count),
                               std::span(decoded).subspan(first * n, count * n)));
    }
  }
}

TEST_CASE("swiglu with updates is silu(gate) * up, the same bits as from two layers") {
  const int64_t n = 90;
  const Source gate(DType::Q8_0, n, 8, 7), up(DType::Q8_0, n, 24, 8);
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const bool both_updated : {true, false}) {
      const LinearWeights gate_weights = gate.weights(both_updated), up_weights = up.weights();
      Context ctx(*kernels, 2, Precision::Fast);
      const PackedLinear layer = pack_linear("test", {&gate_weights, &up_weights}, ctx);
      for (const int64_t rows : {1, 61}) {
        const Floats x = random_floats(rows, kCols, 9);
        Floats both = run(ctx, layer, x, 0, rows), out(rows * n);
        linear_swiglu(ctx, layer, {x.data(), rows, kCols}, out.data());
        for (int64_t m = 0; m < rows; ++m) {
          float* expected = both.data() + m * 2 * n;
          kernels->silu_mul(expected, expected + n, n);
          CHECK(std::equal(expected, expected + n, out.begin() + m * n));
        }
      }
    }
  }
}

TEST_CASE("a centered layer's update takes the rows as they are") {
  const int64_t rows = 80;
  const Source source(DType::Q8_0, 50, 8, 10);
  const LinearWeights with = source.weights(), without = source.weights(false);
  Floats x = random_floats(rows, kCols, 11);
  for (float& value : x) value += 1.5f;
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    Context ctx(*kernels, 2, Precision::Fast);
    const PackedLinear layer = pack_linear("test", {&with}, ctx),
                       plain = pack_linear("test", {&without}, ctx);
    const InputRows input{x.data(), rows, kCols};
    const Center center = center_of(ctx, layer, input);
    CHECK(center.output == center_of(ctx, plain, input).output);
    Floats found(rows * 50), base(rows * 50);
    linear(ctx, layer, input, found.data(), 50, Store::Overwrite, center);
    linear(ctx, plain, input, base.data(), 50, Store::Overwrite, center);
    double error = 0, energy = 0;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < 50; ++n) {
        const double added = source.added(x.data() + m * kCols, n);
        error += std::pow(double{found[m * 50 + n]} - double{base[m * 50 + n]} - added, 2);
        energy += added * added;
      }
    CHECK(error < 2e-7 * energy);
  }
}

}  // namespace qwen2vl::cpu
