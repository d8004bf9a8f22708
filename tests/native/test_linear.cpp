// Whole layers: tasks, threads, kinds of kernels and outliers together.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/linear.h"
#include "kernel_testing.h"

namespace qwen2vl::cpu {
namespace {

/// A layer of a file: matrix and bias.
struct Source {
  TestMatrix matrix;
  Floats bias;

  Source(DType type, int64_t rows, int64_t cols, uint32_t seed, bool with_bias)
      : matrix(type, rows, cols, seed), bias(with_bias ? random_floats(1, rows, seed + 1) : Floats{}) {}
  LinearWeights weights() const {
    const PanelMatrix& p = matrix.panels;
    return {{p.type, p.rows, p.cols, matrix.blocks.data(), nullptr}, {bias.begin(), bias.end()}};
  }
  double value(const Floats& weights, const float* x, int64_t n) const {
    double sum = bias.empty() ? 0 : bias[n];
    for (int64_t k = 0; k < matrix.panels.cols; ++k)
      sum += double{x[k]} * weights[n * matrix.panels.cols + k];
    return sum;
  }
};

constexpr int64_t kCols = 256;

/// What a layer loses to products of the file's weights in double precision.
double loss(const KernelTable& kernels, Precision precision, DType type, bool fine, int64_t rows,
            bool outliers) {
  const int64_t n = 90;
  const Source source(type, n, kCols, 3, true);
  Context ctx(kernels, 3, precision);
  const LinearWeights weights = source.weights();
  PackedLinear layer = pack_linear("test", {&weights}, ctx);
  if (fine) layer.parts[0].inputs = Inputs::Fine;
  const Floats x = random_floats(rows, kCols, 4, outliers), w = source.matrix.dequantized();
  Floats out(rows * n);
  linear(ctx, layer, {x.data(), rows, kCols}, out.data(), n, Store::Overwrite);
  std::vector<double> expected;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t j = 0; j < n; ++j) expected.push_back(source.value(w, x.data() + m * kCols, j));
  return nmse(expected, out);
}

}  // namespace

TEST_CASE("a layer is as near to the file's weights as its precision says") {
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const DType type : dtypes()) {
      CAPTURE(dtype_traits(type).name);
      for (const int64_t rows : {1, 2, 17, 61}) {
        CAPTURE(rows);
        for (const bool outliers : {false, true}) {
          CAPTURE(outliers);
          CHECK(loss(*kernels, Precision::Exact, type, false, rows, outliers) < 1e-10);
          // 8 bits lose 2.3e-5 of the energy in blocks of 32 and 8.2e-5 in groups of 256 on both sides; of
          // few rows, by chance more.
          CHECK(loss(*kernels, Precision::Fast, type, false, rows, outliers) < 1.5e-4);
          CHECK(loss(*kernels, Precision::Fast, type, true, rows, outliers) < 4e-9);
        }
      }
    }
  }
}

TEST_CASE("a fine layer's rows do not depend on how many there are, and add to what is there") {
  const int64_t n = 50, rows = 530;
  const Source source(DType::Q8_0, n, kCols, 5, true);
  const LinearWeights weights = source.weights();
  const Floats x = random_floats(rows, kCols, 6);
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    Context ctx(*kernels, 2, Precision::Fast);
    PackedLinear layer = pack_linear("test", {&weights}, ctx);
    layer.parts[0].inputs = Inputs::Fine;
    Floats all(rows * n), one(n, 0.5f);
    linear(ctx, layer, {x.data(), rows, kCols}, all.data(), n, Store::Overwrite);
    for (const int64_t m : {0, 7, 511, 529}) {
      std::fill(one.begin(), one.end(), 0.5f);
      linear(ctx, layer, {x.data() + m * kCols, 1, kCols}, one.data(), n, Store::Accumulate);
      for (int64_t j = 0; j < n; ++j) CHECK_EQ(one[j], 0.5f + all[m * n + j]);
    }
  }
}

TEST_CASE("a row's result does not depend on the others, whether decoded or not") {
  const int64_t n = 50, rows = 530;
  const Floats x = random_floats(rows, kCols, 16, true);
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const DType type : {DType::Q8_0, DType::Q4_0, DType::Q6_K, DType::F16}) {
      CAPTURE(dtype_traits(type).name);
      const Source source(type, n, kCols, 17, true);
      const LinearWeights weights = source.weights();
      Context ctx(*kernels, 2, Precision::Fast);
      const PackedLinear layer = pack_linear("test", {&weights}, ctx);
      const auto run = [&](int64_t first, int64_t count, int64_t decoded) {
        Floats out(count * n);
        linear(ctx, layer, {x.data() + first * kCols, count, kCols, decoded}, out.data(), n,
               Store::Overwrite);
        return out;
      };
      const Floats prompt = run(0, rows, 0), decoded = run(0, rows, rows);
      CHECK((prompt == decoded) == !(kernels->has_grouped_matmul && type != DType::F16));
      for (const auto& part : {std::pair<int64_t, int64_t>{0, 1}, {7, 1}, {510, 20}, {3, 77}}) {
        const int64_t first = part.first, count = part.second;
        for (const int64_t k : {int64_t{0}, count / 2, count}) {
          CAPTURE(count);
          CAPTURE(k);
          const Floats some = run(first, count, k);
          const int64_t at = first * n;
          CHECK(std::equal(some.begin(), some.begin() + k * n, decoded.begin() + at));
          CHECK(std::equal(some.begin() + k * n, some.end(), prompt.begin() + at + k * n));
        }
      }
    }
  }
}

TEST_CASE("a center changes nothing but what 8 bits lose") {
  const int64_t n = 90, rows = 200;
  const Source source(DType::Q8_0, n, kCols, 11, true);
  const LinearWeights weights = source.weights();
  Floats x = random_floats(rows, kCols, 12, true);
  for (int64_t i = 0; i < rows * kCols; ++i) x[i] += 3.0f * std::cos(static_cast<float>(i % kCols));
  const Floats w = source.matrix.dequantized();
  std::vector<double> expected;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t j = 0; j < n; ++j) expected.push_back(source.value(w, x.data() + m * kCols, j));
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    Context ctx(*kernels, 3, Precision::Fast);
    const PackedLinear layer = pack_linear("test", {&weights}, ctx);
    // Of other rows than it is used for.
    const Center center = center_of(ctx, layer, {x.data(), 60, kCols});
    CHECK(center.mean.empty() == !kernels->has_grouped_matmul);
    if (center.mean.empty()) continue;
    for (int64_t c = 0; c < kCols; ++c) {
      double mean = 0;
      for (int64_t r = 0; r < 60; ++r) mean += x[r * kCols + c] / 60;
      CHECK(center.mean[c] == doctest::Approx(mean).epsilon(1e-4));
    }
    Floats plain(rows * n), centered(rows * n);
    linear(ctx, layer, {x.data(), rows, kCols}, plain.data(), n, Store::Overwrite);
    linear(ctx, layer, {x.data(), rows, kCols}, centered.data(), n, Store::Overwrite, center);
    CHECK(nmse(expected, centered) < 0.5 * nmse(expected, plain));

    Context exact(*kernels, 1, Precision::Exact);
    CHECK(center_of(exact, layer, {x.data(), rows, kCols}).mean.empty());
  }
}

TEST_CASE("a layout is the kernel table's choice: layers packed in another give the same bits") {
  const int64_t n = 50;
  KernelTable usual = *supported_kernels().back();  // generic: it multiplies every layout
  usual.has_grouped_matmul = true;
  KernelTable other = usual;
  other.layout.run = 8;
  for (const DType type : quantized_dtypes()) {
    CAPTURE(dtype_traits(type).name);
    const Source first(type, n, kCols, 18, true), second(type, n, kCols, 19, true);
    const LinearWeights gate = first.weights(), up = second.weights();
    const auto run = [&](const KernelTable& kernels, Precision precision, Inputs inputs, int64_t rows) {
      Context ctx(kernels, 2, precision);
      PackedLinear layer = pack_linear("test", {&gate, &up}, ctx);
      for (PackedLinear::Part& part : layer.parts) {
        part.inputs = inputs;
        CHECK(part.matrix.layout == kernels.layout);
      }
      const Floats x = random_floats(rows, kCols, 20, true);
      Floats out(rows * 2 * n + rows * n);
      linear(ctx, layer, {x.data(), rows, kCols}, out.data(), 2 * n, Store::Overwrite);
      if (inputs != Inputs::Fine)
        linear_swiglu(ctx, layer, {x.data(), rows, kCols}, out.data() + rows * 2 * n);
      return out;
    };
    for (const Inputs inputs : {Inputs::Groups, Inputs::Blocks, Inputs::Fine})
      for (const int64_t rows : {1, 70})
        CHECK(run(usual, Precision::Fast, inputs, rows) == run(other, Precision::Fast, inputs, rows));
    CHECK(run(usual, Precision::Exact, Inputs::Groups, 5) == run(other, Precision::Exact, Inputs::Groups, 5));
  }
}

TEST_CASE("fine parts beside others: each as a layer of its own") {
  const int64_t n = 50, m = 34;
  const Source coarse(DType::Q8_0, n, kCols, 13, true), fine(DType::Q8_0, m, kCols, 14, true);
  const LinearWeights coarse_weights = coarse.weights(), fine_weights = fine.weights();
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    Context ctx(*kernels, 2, Precision::Fast);
    const LayerSource blocks(&coarse_weights, {Inputs::Blocks}), fine_part(&fine_weights, {Inputs::Fine});
    const PackedLinear both = pack_linear("test", {blocks, fine_part}, ctx);
    const PackedLinear first = pack_linear("test", {blocks}, ctx),
                       second = pack_linear("test", {fine_part}, ctx);
    for (const int64_t rows : {1, 5, 70, 530}) {
      CAPTURE(rows);
      const Floats x = random_floats(rows, kCols, 15, true);
      Floats out(rows * (n + m)), a(rows * n), b(rows * m);
      linear(ctx, both, {x.data(), rows, kCols}, out.data(), n + m, Store::Overwrite);
      linear(ctx, first, {x.data(), rows, kCols}, a.data(), n, Store::Overwrite);
      linear(ctx, second, {x.data(), rows, kCols}, b.data(), m, Store::Overwrite);
      for (int64_t r = 0; r < rows; ++r) {
        CHECK(std::equal(a.begin() + r * n, a.begin() + (r + 1) * n, out.begin() + r * (n + m)));
        CHECK(std::equal(b.begin() + r * m, b.begin() + (r + 1) * m, out.begin() + r * (n + m) + n));
      }
    }
  }
}

TEST_CASE("the fewest bits of a layer's parts say how its inputs are taken") {
  const int64_t n = 34;
  const Source q4(DType::Q4_K, n, kCols, 13, true), q5(DType::Q5_K, n, kCols, 14, true),
      q6(DType::Q6_K, n, kCols, 15, true), q8(DType::Q8_0, n, kCols, 16, true);
  const LinearWeights four = q4.weights(), five = q5.weights(), six = q6.weights(), eight = q8.weights();
  Context ctx(select_kernels(""), 1, Precision::Fast);
  constexpr InputsByBits kOf8And6 = {Inputs::Fine, Inputs::Blocks, Inputs::Groups};
  constexpr InputsByBits kOf5 = {Inputs::Groups, Inputs::Groups, Inputs::Blocks};
  const auto inputs_of = [&](InputsByBits inputs, const LinearWeights& first, const LinearWeights& second) {
    const PackedLinear layer = pack_linear("test", {{&first, inputs}, {&second, inputs}}, ctx);
    CHECK(layer.parts[0].inputs == layer.parts[1].inputs);
    return layer.parts[0].inputs;
  };
  CHECK(inputs_of(kOf8And6, eight, eight) == Inputs::Fine);
  CHECK(inputs_of(kOf8And6, eight, six) == Inputs::Blocks);
  CHECK(inputs_of(kOf8And6, five, six) == Inputs::Groups);
  CHECK(inputs_of(kOf5, five, six) == Inputs::Blocks);
  CHECK(inputs_of(kOf5, six, six) == Inputs::Groups);
  CHECK(inputs_of(kOf5, four, five) == Inputs::Groups);
}

TEST_CASE("swiglu is silu(gate) * up, the same bits as from two layers") {
  const int64_t n = 90;
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const DType type : {DType::F16, DType::Q8_0, DType::Q4_0}) {
      CAPTURE(dtype_traits(type).name);
      const Source gate(type, n, kCols, 7, true), up(type, n, kCols, 9, true);
      const LinearWeights gate_weights = gate.weights(), up_weights = up.weights();
      for (const int64_t rows : {1, 3, 61, 512, 530}) {
        CAPTURE(rows);
        for (const int threads : {1, 3}) {
          Context ctx(*kernels, threads, Precision::Fast);
          const PackedLinear layer = pack_linear("test", {&gate_weights, &up_weights}, ctx);
          const Floats x = random_floats(rows, kCols, 8, true);
          Floats both(rows * 2 * n), out(rows * n);
          linear(ctx, layer, {x.data(), rows, kCols}, both.data(), 2 * n, Store::Overwrite);
          const InputRows result = linear_swiglu(ctx, layer, {x.data(), rows, kCols}, out.data());
          CHECK(result.data == out.data());
          CHECK(result.rows == rows);
          CHECK(result.stride == n);
          for (int64_t m = 0; m < rows; ++m) {
            float* expected = both.data() + m * 2 * n;
            kernels->silu_mul(expected, expected + n, n);
            for (int64_t j = 0; j < n; ++j) REQUIRE_EQ(out[m * n + j], expected[j]);
          }
        }
      }
    }
  }
}

}  // namespace qwen2vl::cpu
