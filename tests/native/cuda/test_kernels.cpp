#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>

#include "cuda/kernels/decode_attention.cuh"
#include "cuda/kernels/few_rows.cuh"
#include "cuda/kernels/flash_attention.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/pack.cuh"
#include "cuda/kernels/step.cuh"
#include "kernel_reference.h"

// The kernels, by the functions that launch them where there are some, on shapes that fit nothing: compared
// with plain references, in outputs that show what was written.

namespace qwen2vl::cuda {
namespace {

constexpr auto kTypes = [] {
  std::array<DType, std::size(kDTypes)> types{};
  for (size_t i = 0; i < types.size(); ++i) types[i] = kDTypes[i].type;
  return types;
}();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct WithOrder {
  explicit WithOrder(stand_in::Order order) : before(stand_in::set_order(order)) {}
  ~WithOrder() { stand_in::set_order(before); }
  stand_in::Order before;
};

/// What `compute` returns, seen to be the same where blocks and threads run backwards.
template <typename Compute>
auto in_both_orders(Compute compute) {
  const WithOrder forward(stand_in::Order::Forward);
  const auto result = compute();
  const WithOrder backward(stand_in::Order::Backward);
  CHECK(compute() == result);
  return result;
}

/// Columns that no whole unit of 64 (float types: no vector of 4) ends with.
int64_t columns_of(DType type) {
  const int64_t block = dtype_traits(type).block_elements;
  return block == kBlock256 ? 512 : block == kBlock32 ? 288 : 75;
}

// --- packing -----------------------------------------------------------------------------------------------

/// Every part of `pairs`, packed and expanded, against the rows that they are; `plain`: pair p is features 2
/// p and 2 p + 1 of its layer, as packed_value wants it.
void check_packed(const Pairs& pairs, const std::vector<const Layer*>& layers, int64_t parts, bool plain) {
  Context ctx(0, 0);
  PackingBuffers buffers;
  const PackedLinear packed = pack(ctx, "test", pairs, buffers);
  REQUIRE(static_cast<int64_t>(packed.parts.size()) == parts);
  const auto weight = [&](int64_t pair, int b, int64_t k) {
    if (pair >= static_cast<int64_t>(pairs.size())) return 0.0f;
    const Feature& f = b == 0 ? pairs[pair].first : pairs[pair].second;
    for (const Layer* layer : layers)
      if (f.linear == &layer->linear && k < layer->cols) return layer->weight[f.row * layer->cols + k];
    return 0.0f;
  };
  int64_t tiles = 0;
  for (const PackedMatrix& m : packed.parts) {
    tiles += m.tiles;
    CHECK(m.units % 4 == 0);
    const int64_t stride = m.units * kUnit, rows = m.tiles * kTileSlots;
    CHECK(stride == packed.stride);
    Output<uint16_t> expanded(rows, stride);
    visit_packed(m.type, [&]<DType T>() {
      launch(ctx.stream,
             {"expand_rows", dim3(static_cast<unsigned>(m.units / 4), static_cast<unsigned>(m.tiles)), 128},
             expand_rows<T>, m, expanded.data());
      ctx.synchronize();
      int64_t wrong = 0;
      for (int64_t slot = 0; slot < rows; ++slot)
        for (int64_t k = 0; k < stride; ++k) {
          const int64_t tile = slot / 16, g = slot % 16 / 2, b = slot % 2, pair = m.first_pair + 8 * tile + g;
          const uint16_t at = expanded.data()[(16 * tile + 8 * (g % 2) + g - g % 2 + b) * stride + k];
          const float expected = bf16_of(weight(pair, static_cast<int>(b), k));
          wrong += bf16_to_f32(at) != expected;
          if (plain) wrong += bf16_of(packed_value<T>(m, slot, k)) != expected;
        }
      CHECK(wrong == 0);
    });
    CHECK(expanded.untouched_beyond(stride));
  }
  CHECK(tiles == (static_cast<int64_t>(pairs.size()) + 7) / 8);
  const bool has_bias =
      std::any_of(layers.begin(), layers.end(), [](const Layer* layer) { return !layer->bias.empty(); });
  CHECK((packed.bias != nullptr) == has_bias);
  for (size_t i = 0; i < pairs.size(); ++i)
    for (int b = 0; b < 2 && packed.bias != nullptr; ++b) {
      const Feature& f = b == 0 ? pairs[i].first : pairs[i].second;
      const float expected =
          f.linear == nullptr || f.linear->bias.size == 0 ? 0.0f : f.linear->bias.data[f.row];
      CHECK((b == 0 ? packed.bias[i].x : packed.bias[i].y) == expected);
    }
}

TEST_CASE("rows packed and expanded are the rows, in the documented order") {
  for (const DType type : kTypes) {
    CAPTURE(dtype_traits(type).name);
    const bool is_float = dtype_traits(type).block_elements == 1;
    for (const int64_t cols : {int64_t{72}, columns_of(type), int64_t{256}}) {
      if (!is_float && cols % dtype_traits(type).block_elements != 0) continue;
      CAPTURE(cols);
      const Layer odd(type, 37, cols, 1), even(type, 16, cols, 2, false), few(type, 5, cols, 3),
          as_few(type, 5, cols, 4);
      check_packed(neighbouring(odd.linear), {&odd}, 1, true);
      check_packed(neighbouring(even.linear), {&even}, 1, true);
      check_packed(side_by_side(few.linear, as_few.linear), {&few, &as_few}, 1, false);
      Pairs heads;  // 3 heads of 10 dimensions, 1 of the other layer, 5 pairs each filled up to 8
      const Layer queries(type, 30, cols, 5), keys(type, 10, cols, 6, false);
      append_heads(heads, queries.linear, 3, 10);
      append_heads(heads, keys.linear, 1, 10);
      CHECK(heads.size() == 32);
      check_packed(heads, {&queries, &keys}, 1, false);
    }
  }
}

TEST_CASE("heads of two stored types become two parts") {
  const Layer queries(DType::Q4_0, 40, 256, 1), keys(DType::Q6_K, 20, 256, 2),
      values(DType::Q6_K, 20, 256, 3, false);
  Pairs pairs;
  append_heads(pairs, queries.linear, 2, 20);
  append_heads(pairs, keys.linear, 1, 20);
  append_heads(pairs, values.linear, 1, 20);
  check_packed(pairs, {&queries, &keys, &values}, 2, false);

  Context ctx(0, 0);
  PackingBuffers buffers;
  const Layer six(DType::Q4_0, 6, 256, 4);
  Pairs uneven = neighbouring(six.linear);
  uneven.push_back({{&keys.linear, 0}, {&keys.linear, 1}});
  CHECK_THROWS_AS(pack(ctx, "test", uneven, buffers), UnsupportedError);
}

// --- products ----------------------------------------------------------------------------------------------

/// What `run` leaves, told where to by an epilogue; Residual is added to `before`.
template <typename Run>
Doubles outputs(Finish finish, int64_t rows, int64_t columns, const Values& before, Run run) {
  const bool is_float = finish == Finish::Store || finish == Finish::Residual;
  const bool is_gelu = finish == Finish::QuickGelu || finish == Finish::Gelu || finish == Finish::StoreBf16;
  const int64_t stride = (columns + 1) / 2 * 2 + 6;
  Output<float> out(rows, stride);
  Output<uint16_t> half_out(rows, stride);
  if (finish == Finish::Residual)
    for (int64_t i = 0; i < rows * columns; ++i) out.data()[i / columns * stride + i % columns] = before[i];
  Epilogue e;
  e.out = is_float ? out.data() : nullptr;
  e.half_out = is_float ? nullptr : half_out.data();
  e.stride = stride;
  e.columns = static_cast<int32_t>(columns);
  run(e);
  // Those that write two columns at a time leave a zero behind an odd number.
  const int64_t written = is_gelu ? (columns + 1) / 2 * 2 : columns;
  CHECK(out.untouched_beyond(is_float ? written : 0));
  CHECK(half_out.untouched_beyond(is_float ? 0 : written));
  if (written > columns)
    for (int64_t row = 0; row < rows; ++row) CHECK(half_out.data()[row * stride + columns] == 0);
  return is_float ? out.values(columns) : half_out.values(columns);
}

/// A layer to multiply with, and gate and up for SwiGLU, packed.
struct Product {
  Context ctx{0, 0};
  DType type;
  Layer layer, gate, up;
  PackingBuffers buffers;
  PackedLinear packed, both;
  Values before;

  Product(DType stored_type, int64_t features, int64_t cols, int64_t rows)
      : type(stored_type),
        layer(type, features, cols, 11),
        gate(type, 21, cols, 12),
        up(type, 21, cols, 13, false),
        packed(pack(ctx, "layer", neighbouring(layer.linear), buffers)),
        both(pack(ctx, "gate and up", side_by_side(gate.linear, up.linear), buffers)),
        before(random_values(rows * features, 14, 20.0f)) {}

  const PackedLinear& linear(Finish finish) const { return finish == Finish::SwiGlu ? both : packed; }
  int64_t columns(Finish finish) const { return finish == Finish::SwiGlu ? gate.rows : layer.rows; }

  Doubles few(const FewInput& input, int64_t rows, Finish finish) {
    return outputs(finish, rows, columns(finish), before, [&](const Epilogue& e) {
      few_rows_linear(ctx, linear(finish), input, rows, finish, e);
      ctx.synchronize();
    });
  }
  Doubles many(const Halves& x, int64_t rows, Finish finish) {
    return outputs(finish, rows, columns(finish), before, [&](const Epilogue& e) {
      DeviceBuffer expanded;
      many_rows_linear(ctx, linear(finish), x.data(), rows, finish, e, expanded);
      ctx.synchronize();
    });
  }
  /// Of x [rows][cols]; `rounded`: weights are bf16.
  Doubles reference(const Doubles& x, Finish finish, bool rounded) const {
    const auto product = [&](const Layer& l) { return l.product(x, rounded ? l.rounded() : l.multiplied()); };
    Doubles out = product(finish == Finish::SwiGlu ? gate : layer);
    const Doubles other = finish == Finish::SwiGlu ? product(up) : Doubles();
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = finish == Finish::SwiGlu ? silu_of(out[i]) * other[i] : finished(finish, out[i]);
      if (finish == Finish::Residual) out[i] += before[i];
    }
    return out;
  }
};

double tolerance(Finish finish) {
  return finish == Finish::Store || finish == Finish::Residual ? kExact : kStored;
}

/// The first rows of x [rows][cols] as bf16 has them.
Doubles first_rows(const Values& x, int64_t rows, int64_t cols) {
  Doubles out(rows * cols);
  for (size_t i = 0; i < out.size(); ++i) out[i] = bf16_of(x[i]);
  return out;
}

TEST_CASE("pairs of two stored types, gate and up, are bf16") {
  const Layer gate(DType::Q4_K, 21, 256, 4), up(DType::Q6_K, 21, 256, 5);
  const Pairs pairs = side_by_side(gate.linear, up.linear);
  check_packed(pairs, {&gate, &up}, 1, false);
  Context ctx(0, 0);
  PackingBuffers buffers;
  const PackedLinear packed = pack(ctx, "gate and up", pairs, buffers);
  CHECK(packed.parts[0].type == DType::BF16);
  const Doubles x(first_rows(random_values(2 * 256, 6), 2, 256));
  const Halves half = bf16_rows(Values(x.begin(), x.end()), 256, packed.stride);
  Doubles reference = gate.product(x, gate.rounded());
  const Doubles other = up.product(x, up.rounded());
  for (size_t i = 0; i < reference.size(); ++i) reference[i] = silu_of(reference[i]) * other[i];
  const Doubles found = outputs(Finish::SwiGlu, 2, 21, {}, [&](const Epilogue& e) {
    few_rows_linear(ctx, packed, {half.data()}, 2, Finish::SwiGlu, e);
    ctx.synchronize();
  });
  CHECK(distance(found, reference) < kStored);
}

constexpr std::array kFewFinishes{Finish::Store, Finish::Residual, Finish::SwiGlu};

TEST_CASE("few rows: products, and a row has the same bits alone and among others") {
  for (const DType type : kTypes) {
    CAPTURE(dtype_traits(type).name);
    const int64_t cols = columns_of(type);
    Product product(type, 137, cols, 40);  // more tiles than blocks
    const Values x = random_values(40 * cols, 21);
    const Halves half = bf16_rows(x, cols, product.packed.stride);
    for (const Finish finish : kFewFinishes) {
      CAPTURE(static_cast<int>(finish));
      const int64_t columns = product.columns(finish);
      const Doubles reference = product.reference(first_rows(x, 40, cols), finish, false);
      const Doubles all = product.few({half.data()}, 40, finish);
      CHECK(distance(all, reference) < tolerance(finish));
      for (const int64_t rows : {1, 2, 3, 8, 9}) {
        CAPTURE(rows);
        CHECK(product.few({half.data()}, rows, finish) == Doubles(all.begin(), all.begin() + rows * columns));
      }
      if (finish == Finish::Residual) continue;  // what it is added to is the first rows'
      for (const int64_t row : {5, 12, 39})
        CHECK(product.few({half.data() + row * product.packed.stride}, 1, finish) ==
              Doubles(all.begin() + row * columns, all.begin() + (row + 1) * columns));
    }
  }
}

TEST_CASE("few rows: one or two, through RMSNorm first") {
  for (const DType type : kTypes)
    for (const int64_t cols : {columns_of(type), int64_t{256}}) {
      CAPTURE(dtype_traits(type).name);
      CAPTURE(cols);
      if (cols % dtype_traits(type).block_elements != 0) continue;
      Product product(type, 37, cols, 2);
      const Values x = random_values(2 * cols, 22, 3.0f), weight = random_values(cols, 23);
      const FewInput input{nullptr, x.data(), weight.data(), 1e-3f};
      const Doubles normed = normalized(x, weight, {}, 1e-3);
      for (const Finish finish : kFewFinishes) {
        CAPTURE(static_cast<int>(finish));
        const Doubles reference = product.reference(normed, finish, false);
        const Doubles both = product.few(input, 2, finish);
        CHECK(distance(both, reference) < kRounded);
        const Doubles first(both.begin(), both.begin() + product.columns(finish));
        CHECK(product.few(input, 1, finish) == first);
        // As the norm's own kernel and the product of its rows have them.
        Halves half(2 * product.packed.stride, 0);
        norm(product.ctx, "norm",
             {x.data(), weight.data(), nullptr, 1e-3f, static_cast<int32_t>(cols), 2, half.data(), nullptr,
              product.packed.stride});
        CHECK(product.few({half.data()}, 2, finish) == both);
      }
    }
}

TEST_CASE("few rows: many inputs, split over many warps, or too many for shared memory") {
  for (const auto& [cols, rows] : {std::pair<int64_t, int64_t>{4352, 2}, {4352, 9}, {14880, 8}}) {
    CAPTURE(cols);
    Product product(DType::Q4_0, 5, cols, rows);
    const Values x = random_values(rows * cols, 24);
    const Halves half = bf16_rows(x, cols, product.packed.stride);
    const Doubles all = product.few({half.data()}, rows, Finish::Store);
    CHECK(distance(all, product.reference(first_rows(x, rows, cols), Finish::Store, false)) < kExact);
    CHECK(product.few({half.data()}, 1, Finish::Store) == Doubles(all.begin(), all.begin() + 5));
    if (cols < 10000) continue;
    const FewInput too_long{nullptr, x.data(), x.data(), 1e-6f};
    CHECK_THROWS_AS(product.few(too_long, 8, Finish::Store), UnsupportedError);
  }
}

TEST_CASE("many rows: products, finished in every way") {
  for (const DType type : kTypes) {
    CAPTURE(dtype_traits(type).name);
    const int64_t cols = columns_of(type), features = type == DType::Q8_0 ? 137 : 37;  // beyond one tile, too
    Product product(type, features, cols, 130);
    const Values x = random_values(130 * cols, 31);
    const Halves half = bf16_rows(x, cols, product.packed.stride);
    for (const Finish finish : {Finish::Store, Finish::StoreBf16, Finish::Residual, Finish::SwiGlu,
                                Finish::QuickGelu, Finish::Gelu}) {
      CAPTURE(static_cast<int>(finish));
      for (const int64_t rows : {1, 65, 130}) {
        if (rows == 130 && type != DType::Q8_0 && type != DType::F32) continue;
        CAPTURE(rows);
        Doubles reference = product.reference(first_rows(x, rows, cols), finish, true);
        CHECK(distance(product.many(half, rows, finish), reference) < tolerance(finish));
      }
    }
    const Doubles all = product.many(half, 65, Finish::Store);
    CHECK(product.many(half, 1, Finish::Store) == Doubles(all.begin(), all.begin() + features));
  }
}

TEST_CASE("products with a layer of two stored types") {
  constexpr int64_t kFirst = 48, kSecond = 21, kAll = kFirst + kSecond, kCols = 256, kRows = 9;
  Context ctx(0, 0);
  PackingBuffers buffers;
  const Layer first(DType::Q4_0, kFirst, kCols, 15), second(DType::Q6_K, kSecond, kCols, 16);
  Pairs pairs = neighbouring(first.linear);
  const Pairs others = neighbouring(second.linear);
  pairs.insert(pairs.end(), others.begin(), others.end());
  const PackedLinear packed = pack(ctx, "layer", pairs, buffers);
  REQUIRE(packed.parts.size() == 2);
  const Values x = random_values(kRows * kCols, 26);
  const Halves half = bf16_rows(x, kCols, packed.stride);
  const auto reference = [&](bool rounded) {
    const auto product = [&](const Layer& l) {
      return l.product(first_rows(x, kRows, kCols), rounded ? l.rounded() : l.multiplied());
    };
    const Doubles a = product(first), b = product(second);
    Doubles out;
    for (int64_t row = 0; row < kRows; ++row) {
      out.insert(out.end(), a.begin() + row * kFirst, a.begin() + (row + 1) * kFirst);
      out.insert(out.end(), b.begin() + row * kSecond, b.begin() + (row + 1) * kSecond);
    }
    return out;
  };
  const Doubles few = outputs(Finish::Store, kRows, kAll, {}, [&](const Epilogue& e) {
    few_rows_linear(ctx, packed, {half.data()}, kRows, Finish::Store, e);
    ctx.synchronize();
  });
  CHECK(distance(few, reference(false)) < kExact);
  DeviceBuffer expanded;
  const Doubles many = outputs(Finish::Store, kRows, kAll, {}, [&](const Epilogue& e) {
    many_rows_linear(ctx, packed, half.data(), kRows, Finish::Store, e, expanded);
    ctx.synchronize();
  });
  CHECK(distance(many, reference(true)) < kExact);
}

TEST_CASE("products have the same bits where blocks and threads run backwards") {
  Product product(DType::Q6_K, 37, 512, 65);
  const Halves half = bf16_rows(random_values(65 * 512, 25), 512, product.packed.stride);
  (void)in_both_orders([&] { return product.few({half.data()}, 9, Finish::Residual); });
  (void)in_both_orders([&] { return product.few({half.data()}, 2, Finish::SwiGlu); });
  (void)in_both_orders([&] { return product.many(half, 65, Finish::Residual); });
}

TEST_CASE("plain products, of weights as the file has them") {
  Context ctx(0, 0);
  for (const DType type : kTypes)
    for (const int64_t rows : {1, 19}) {
      CAPTURE(dtype_traits(type).name);
      const int64_t cols = columns_of(type), x_stride = cols + 3;
      const Layer layer(type, 37, cols, 41, rows == 1);
      const StoredLinear stored = store(ctx, "layer", layer.linear);
      const Values x = random_values(rows * cols, 42);
      Values apart(rows * x_stride, kNaN);
      for (int64_t i = 0; i < rows * cols; ++i) apart[i / cols * x_stride + i % cols] = x[i];
      Output<float> out(rows, 41);
      Doubles reference = layer.product({x.begin(), x.end()}, layer.weight);
      for (const bool accumulate : {false, true}) {
        plain_linear_rows(ctx, stored, apart.data(), x_stride, rows, out.data(), 41, accumulate);
        ctx.synchronize();
        CHECK(distance(out.values(37), reference) < kExact);
        CHECK(out.untouched_beyond(37));
        for (double& v : reference) v *= 2;
      }
    }
}

// --- norms -------------------------------------------------------------------------------------------------

TEST_CASE("RMSNorm and LayerNorm") {
  Context ctx(0, 0);
  for (const auto& [width, rows] :
       {std::pair<int64_t, int64_t>{37, 3}, {40, 3}, {40, 1025}, {72, 5}, {1536, 2}, {1540, 2}, {4100, 2}}) {
    CAPTURE(width);
    CAPTURE(rows);
    Values x = random_values(rows * width, 51, 2.0f);
    for (float& v : x) v += 5.0f;  // a mean that matters
    const Values weight = random_values(width, 52), bias = random_values(width, 53);
    for (const bool with_bias : {false, true}) {
      CAPTURE(with_bias);
      const Doubles reference = normalized(x, weight, with_bias ? bias : Values(), 1e-2);
      const int64_t stride = width + (width % 4 == 0 ? 8 : 3);
      Output<float> out(rows, stride);
      Output<uint16_t> half_out(rows, stride);
      Norm p{x.data(),
             weight.data(),
             with_bias ? bias.data() : nullptr,
             1e-2f,
             static_cast<int32_t>(width),
             static_cast<int32_t>(rows),
             nullptr,
             out.data(),
             stride};
      norm(ctx, "norm", p);
      p.half_out = half_out.data();
      p.out = nullptr;
      norm(ctx, "norm", p);
      ctx.synchronize();
      CHECK(distance(out.values(width), reference) < kExact);
      CHECK(distance(half_out.values(width), reference) < kStored);
      CHECK(out.untouched_beyond(width));
      CHECK(half_out.untouched_beyond(width));
    }
  }
}

// --- attention ---------------------------------------------------------------------------------------------

/// Scores of some size in powers of two, as the queries' scale makes them.
Halves random_queries(int64_t n, int64_t head_dim, uint32_t seed) {
  return f16_values(random_values(n, seed, 2.0f / std::sqrt(static_cast<float>(head_dim))));
}

template <int kHeadDim, int kRowTiles>
void check_full_attention(int64_t rows, int64_t cells, int64_t steps) {
  CAPTURE(kHeadDim);
  CAPTURE(rows);
  Context ctx(0, 0);
  constexpr int64_t kHeads = 2, kTrue = kHeadDim - 2;
  const int64_t key_stride = steps * cells * kHeadDim, stride = kHeads * kTrue + 4;
  const Halves queries = random_queries(kHeads * steps * rows * kHeadDim, kHeadDim, 61);
  const Halves keys = f16_values(random_values(kHeads * key_stride, 62));
  const Halves values = f16_values(random_values(kHeads * key_stride, 63));
  Doubles reference;
  for (int64_t i = 0; i < steps * rows; ++i)
    for (int64_t h = 0; h < kHeads; ++h) {
      const int64_t first = h * key_stride + i / rows * cells * kHeadDim;
      const Doubles row = attend(
          queries.data() + (h * steps * rows + i) * kHeadDim, kHeadDim, cells,
          [&](int64_t c) { return keys.data() + first + c * kHeadDim; },
          [&](int64_t c) { return values.data() + first + c * kHeadDim; });
      reference.insert(reference.end(), row.begin(), row.begin() + kTrue);
    }
  const Doubles out = in_both_orders([&] {
    Output<uint16_t> to(steps * rows, stride);
    FlashAttention p{};
    p.queries = queries.data();
    p.query_row_stride = kHeadDim;
    p.query_head_stride = steps * rows * kHeadDim;
    p.rows = static_cast<int32_t>(rows);
    p.cells = static_cast<int32_t>(cells);
    p.keys = keys.data();
    p.values = values.data();
    p.key_head_stride = key_stride;
    p.group = 1;
    p.first_cell = -1;
    p.out = to.data();
    p.stride = stride;
    p.true_head_dim = kTrue;
    launch(ctx.stream,
           {"attention",
            dim3(static_cast<unsigned>(ceil_div(static_cast<int>(rows), 64 * kRowTiles)), kHeads,
                 static_cast<unsigned>(steps)),
            kFlashThreads, flash_shared_bytes(kHeadDim, kRowTiles)},
           flash_attention<kHeadDim, kRowTiles>, p);
    ctx.synchronize();
    CHECK(to.untouched_beyond(kHeads * kTrue));
    return to.values(kHeads * kTrue);
  });
  CHECK(distance(out, reference) < kRounded);
}

TEST_CASE("attention of many queries that see everything") {
  check_full_attention<32, 2>(70, 70, 2);
  check_full_attention<32, 2>(1, 1, 1);
  check_full_attention<80, 2>(133, 133, 1);
  check_full_attention<80, 2>(9, 64, 2);
  check_full_attention<128, 1>(65, 129, 1);
}

/// Pages of a sequence, two layers of two key-value heads; what is beyond its cells is NaN.
struct Pages {
  static constexpr int64_t kKeyHeads = 2;
  PageLayout layout;
  std::vector<Halves> pages;
  std::vector<uint8_t*> table;

  Pages(int64_t head_dim, int64_t cells, uint32_t seed) : layout{kKeyHeads, static_cast<int32_t>(head_dim)} {
    for (int64_t first = 0; first < cells; first += kPageCells) {
      Halves& page = pages.emplace_back(f16_values(random_values(layout.panel(2, 0, 0), seed++)));
      for (size_t i = 0; i < page.size(); ++i)
        if (first + static_cast<int64_t>(i) / head_dim % kPageCells >= cells) page[i] = 0x7e00;
    }
    for (Halves& page : pages) table.push_back(reinterpret_cast<uint8_t*>(page.data()));
  }
  const uint16_t* at(int layer, int value, int64_t head, int64_t cell) const {
    return pages[cell / kPageCells].data() + layout.panel(layer, value, static_cast<int>(head)) +
           cell % kPageCells * layout.head_dim;
  }
  /// Of heads [heads][head_dim] that see `cells` cells, the first `kept` dimensions.
  Doubles attended(const uint16_t* queries, int64_t heads, int64_t cells, int64_t kept) const {
    Doubles out;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t from = h / (heads / kKeyHeads);
      const Doubles row = attend(
          queries + h * layout.head_dim, layout.head_dim, cells, [&](int64_t c) { return at(1, 0, from, c); },
          [&](int64_t c) { return at(1, 1, from, c); });
      out.insert(out.end(), row.begin(), row.begin() + kept);
    }
    return out;
  }
};

TEST_CASE("attention of a prompt over its pages, causal") {
  Context ctx(0, 0);
  constexpr int64_t kHeads = 6, kDim = 64, kTrue = 50, kStride = kHeads * kTrue + 8;
  for (const auto& [first_cell, rows] : {std::pair<int64_t, int64_t>{0, 1}, {0, 130}, {63, 2}, {100, 70}}) {
    CAPTURE(first_cell);
    const Pages pages(kDim, first_cell + rows, 71);
    const Halves queries = random_queries(rows * kHeads * kDim, kDim, 72);
    Doubles reference;
    for (int64_t i = 0; i < rows; ++i) {
      const Doubles row =
          pages.attended(queries.data() + i * kHeads * kDim, kHeads, first_cell + i + 1, kTrue);
      reference.insert(reference.end(), row.begin(), row.end());
    }
    const Doubles out = in_both_orders([&] {
      Output<uint16_t> to(rows, kStride);
      FlashAttention p{};
      p.queries = queries.data();
      p.query_row_stride = kHeads * kDim;
      p.query_head_stride = kDim;
      p.rows = static_cast<int32_t>(rows);
      p.cells = static_cast<int32_t>(first_cell + rows);
      p.page_table = pages.table.data();
      p.pages = pages.layout;
      p.layer = 1;
      p.group = kHeads / Pages::kKeyHeads;
      p.first_cell = static_cast<int32_t>(first_cell);
      p.out = to.data();
      p.stride = kStride;
      p.true_head_dim = kTrue;
      launch(ctx.stream,
             {"attention", dim3(static_cast<unsigned>((rows + 63) / 64), kHeads), kFlashThreads,
              flash_shared_bytes(kDim, 1)},
             flash_attention<kDim, 1>, p);
      ctx.synchronize();
      CHECK(to.untouched_beyond(kHeads * kTrue));
      return to.values(kHeads * kTrue);
    });
    CHECK(distance(out, reference) < kRounded);
  }
}

template <int kDim>
void check_decode_attention(const std::vector<int64_t>& lengths) {
  CAPTURE(kDim);
  Context ctx(0, 0);
  constexpr int64_t kHeads = 4, kTrue = kDim - 10, kColumns = kHeads * kTrue, kStride = kColumns + 5;
  const int64_t rows = static_cast<int64_t>(lengths.size());
  const Halves queries = random_queries(rows * kHeads * kDim, kDim, 81);
  std::vector<std::unique_ptr<Pages>> sequences;
  std::vector<RowInfo> infos(rows);
  Doubles reference;
  for (int64_t i = 0; i < rows; ++i) {
    const Pages& pages = *sequences.emplace_back(std::make_unique<Pages>(kDim, lengths[i], 1000 * i + 82));
    infos[i].pages = pages.table.data();
    infos[i].cell = static_cast<int32_t>(lengths[i] - 1);
    const Doubles row = pages.attended(queries.data() + i * kHeads * kDim, kHeads, lengths[i], kTrue);
    reference.insert(reference.end(), row.begin(), row.end());
  }
  std::vector<uint32_t> arrived(rows * kHeads, 0);
  const auto attend_rows = [&](int64_t first, int64_t n, bool single) {
    Output<uint16_t> to(n, kStride);
    Values parts(n * kHeads * kMaxChunks * (2 + kDim), kNaN);
    int chunks = 1;
    for (int64_t i = first; i < first + n; ++i) {
      const int pages = ceil_div(infos[i].cell + 1, kPageCells);
      chunks = std::max(chunks, ceil_div(pages, pages_per_chunk(pages)));
    }
    const DecodeAttention p{queries.data() + first * kHeads * kDim,
                            infos.data() + first,
                            sequences[0]->layout,
                            1,
                            kHeads / Pages::kKeyHeads,
                            kHeads,
                            kTrue,
                            parts.data(),
                            arrived.data(),
                            to.data(),
                            kStride,
                            single ? 1 : 0};
    launch(ctx.stream,
           {"attention", dim3(static_cast<unsigned>(chunks), kHeads, static_cast<unsigned>(n)),
            kDecodeThreads, decode_attention_shared_bytes(kDim)},
           decode_attention<kDim>, p);
    ctx.synchronize();
    CHECK(to.untouched_beyond(kColumns));
    CHECK(std::all_of(arrived.begin(), arrived.end(), [](uint32_t n) { return n == 0; }));
    return to.values(kColumns);
  };
  const Doubles all = in_both_orders([&] { return attend_rows(0, rows, false); });
  CHECK(attend_rows(0, rows, true) == all);
  for (int64_t i = 0; i < rows; ++i) {
    CAPTURE(lengths[i]);
    const Doubles row(all.begin() + i * kColumns, all.begin() + (i + 1) * kColumns);
    CHECK(distance(row, {reference.begin() + i * kColumns, reference.begin() + (i + 1) * kColumns}) <
          kStored);
    CHECK(attend_rows(i, 1, true) == row);
  }
}

TEST_CASE("attention of single rows over their pages") {
  check_decode_attention<64>({1, 64, 65, 700, 2300});
  check_decode_attention<128>({2300, 1, 700, 65, 64});
}

// --- the likeliest token -----------------------------------------------------------------------------------

TEST_CASE("the likeliest token: the first of equal ones, never NaN, -1 where none is finite") {
  Context ctx(0, 0);
  constexpr int64_t kVocab = 1003;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  struct Row {
    Values logits;
    int32_t expected;
  };
  std::vector<Row> rows;
  const auto add = [&](float fill, const std::vector<std::pair<int, float>>& set, int32_t expected) {
    Row& row = rows.emplace_back(Row{Values(kVocab, fill), expected});
    for (const auto& [at, value] : set) row.logits[at] = value;
  };
  add(0.0f, {}, 0);
  add(-1.0f, {{1002, 2.0f}}, 1002);
  add(-1.0f, {{900, 2.0f}, {255, 2.0f}, {256, 2.0f}}, 255);
  add(-1.0f, {{7, -0.0f}, {6, -0.5f}, {700, 0.0f}}, 7);
  add(-3.0f, {{0, kNaN}, {1002, kNaN}, {300, -2.0f}}, 300);
  add(kNaN, {{513, -1e30f}}, 513);
  add(-kInfinity, {{514, -1e30f}}, 514);
  add(kNaN, {}, -1);
  add(-kInfinity, {}, -1);
  add(kNaN, {{5, -kInfinity}}, -1);
  add(1.0f, {{5, kInfinity}}, -1);
  const auto n = static_cast<unsigned>(rows.size());
  Values logits;
  for (const Row& row : rows) logits.insert(logits.end(), row.logits.begin(), row.logits.end());
  std::vector<uint32_t> arrived(n, 0);
  for (const unsigned parts : {1u, 3u, 64u}) {
    CAPTURE(parts);
    const std::vector<int32_t> tokens = in_both_orders([&] {
      std::vector<Likeliest> found(n * parts, {kInfinity, 99});
      std::vector<int32_t> out(n + 1, -77);
      const float embedding = 0;
      std::vector<RowInfo> infos(n, {nullptr, &embedding, 3, 10, {4, 5, 6}});
      launch(ctx.stream, {"likeliest", dim3(parts, n), kLikeliestThreads, 128}, find_likeliest,
             FindLikeliest{logits.data(), kVocab, found.data(), arrived.data(), out.data(), infos.data()});
      ctx.synchronize();
      for (unsigned i = 0; i < n; ++i) {
        CHECK(arrived[i] == 0);
        CHECK(infos[i].token == std::max(out[i], 0));
        CHECK(infos[i].embedding == nullptr);
        CHECK(infos[i].cell == 11);
        CHECK((infos[i].position[0] == 5 && infos[i].position[1] == 6 && infos[i].position[2] == 7));
      }
      return out;
    });
    for (unsigned i = 0; i < n; ++i) {
      CAPTURE(i);
      CHECK(tokens[i] == rows[i].expected);
    }
    CHECK(tokens[n] == -77);
  }
}

}  // namespace
}  // namespace qwen2vl::cuda
