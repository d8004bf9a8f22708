#include <algorithm>
#include <cstring>
#include <map>

#include "base/half.h"
#include "cuda/kernels/many_rows.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/pack.cuh"
#include "cuda/kernels/plain.cuh"
#include "cuda/linear.h"
#include "cuda/wgmma.h"
#include "quant/quantize.h"

namespace qwen2vl::cuda {
namespace {

DType type_of(const Feature& feature) { return static_cast<DType>(feature.linear->weight.type); }

/// What both features of a pair are packed as; of two types, bf16. A pair of zeros is of any.
DType type_of(const std::pair<Feature, Feature>& pair, DType any) {
  const auto& [a, b] = pair;
  if (a.linear == nullptr) return b.linear == nullptr ? any : type_of(b);
  return b.linear == nullptr || type_of(a) == type_of(b) ? type_of(a) : DType::BF16;
}

/// A matrix's rows as bf16.
std::vector<uint8_t> as_bf16(const qwen2vl_matrix& m) {
  const DType type = static_cast<DType>(m.type);
  std::vector<uint8_t> out(static_cast<size_t>(2 * m.rows * m.cols));
  std::vector<float> row(static_cast<size_t>(m.cols));
  for (int64_t i = 0; i < m.rows; ++i) {
    dequantize_row(type, m.data + i * row_bytes(type, m.cols), m.cols, row.data());
    for (int64_t k = 0; k < m.cols; ++k) {
      const uint16_t half = f32_to_bf16(row[static_cast<size_t>(k)]);
      std::memcpy(out.data() + 2 * (i * m.cols + k), &half, sizeof half);
    }
  }
  return out;
}

/// Uploads the matrices that `pairs` [begin, end) read, as `type` if they are not, and writes the address of
/// every slot's row.
class RowAddresses {
 public:
  RowAddresses(const Pairs& pairs, int64_t begin, int64_t end, DType type, PackingBuffers& buffers) {
    std::map<const uint8_t*, std::pair<int64_t, const qwen2vl_matrix*>> places;  // data -> offset
    int64_t bytes = 0;
    const auto size = [&](const qwen2vl_matrix& m) { return m.rows * row_bytes(type, m.cols); };
    for (int64_t i = begin; i < end; ++i)
      for (const Feature* f : {&pairs[i].first, &pairs[i].second})
        if (f->linear != nullptr &&
            places.try_emplace(f->linear->weight.data, bytes, &f->linear->weight).second)
          bytes += (size(f->linear->weight) + 255) / 256 * 256;
    buffers.raw.resize(bytes);
    for (const auto& [data, place] : places) {
      const auto& [offset, matrix] = place;
      const bool same = static_cast<DType>(matrix->type) == type;
      const std::vector<uint8_t> converted = same ? std::vector<uint8_t>() : as_bf16(*matrix);
      check(cudaMemcpy(buffers.raw.as() + offset, same ? data : converted.data(),
                       static_cast<size_t>(size(*matrix)), cudaMemcpyHostToDevice),
            "copying weights to the device");
    }
    const int64_t tiles = (end - begin + kTilePairs - 1) / kTilePairs;
    addresses_.assign(tiles * kTileSlots, nullptr);
    for (int64_t i = begin; i < end; ++i)
      for (int b = 0; b < 2; ++b) {
        const Feature& f = b == 0 ? pairs[i].first : pairs[i].second;
        if (f.linear == nullptr) continue;
        const qwen2vl_matrix& m = f.linear->weight;
        addresses_[(i - begin) / kTilePairs * kTileSlots + 8 * b + (i - begin) % kTilePairs] =
            buffers.raw.as() + places.at(m.data).first + f.row * row_bytes(type, m.cols);
      }
    buffers.addresses.resize(static_cast<int64_t>(addresses_.size()) * 8);
    check(
        cudaMemcpy(buffers.addresses.as(), addresses_.data(), addresses_.size() * 8, cudaMemcpyHostToDevice),
        "copying row addresses to the device");
  }

 private:
  std::vector<const uint8_t*> addresses_;
};

}  // namespace

Pairs neighbouring(const qwen2vl_linear& linear) {
  Pairs pairs;
  for (int64_t row = 0; row < linear.weight.rows; row += 2)
    pairs.push_back({{&linear, row}, row + 1 < linear.weight.rows ? Feature{&linear, row + 1} : Feature{}});
  return pairs;
}

Pairs side_by_side(const qwen2vl_linear& a, const qwen2vl_linear& b) {
  Pairs pairs;
  for (int64_t row = 0; row < a.weight.rows; ++row) pairs.push_back({{&a, row}, {&b, row}});
  return pairs;
}

int64_t pairs_per_head(int64_t head_dim) { return (head_dim / 2 + kTilePairs - 1) / kTilePairs * kTilePairs; }

void append_heads(Pairs& pairs, const qwen2vl_linear& linear, int64_t heads, int64_t head_dim) {
  const int64_t half = head_dim / 2, padded = pairs_per_head(head_dim);
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t i = 0; i < padded; ++i)
      if (i < half)
        pairs.push_back({{&linear, head * head_dim + i}, {&linear, head * head_dim + half + i}});
      else
        pairs.push_back({});
}

Work PackedLinear::work(int64_t n) const {
  return {0, 2.0 * static_cast<double>(n) * static_cast<double>(rows) * static_cast<double>(cols),
          static_cast<double>(bytes)};
}

int64_t packed_bytes(const qwen2vl_matrix& matrix) {
  if (matrix.data == nullptr) return 0;
  const PackedFormat format(dtype_traits(packed_type(static_cast<DType>(matrix.type))).format);
  const int64_t units = (matrix.cols + 4 * kUnit - 1) / (4 * kUnit) * 4;
  return (matrix.rows + kTileSlots - 1) / kTileSlots * format.bytes(units);
}

PackedLinear pack(Context& ctx, const char* name, const Pairs& pairs, PackingBuffers& buffers) {
  PackedLinear out;
  out.name = name;
  std::vector<float2> bias((pairs.size() + kTilePairs - 1) / kTilePairs * kTilePairs, make_float2(0, 0));
  bool has_bias = false;
  for (size_t i = 0; i < pairs.size(); ++i)
    for (int b = 0; b < 2; ++b) {
      const Feature& f = b == 0 ? pairs[i].first : pairs[i].second;
      if (f.linear == nullptr) continue;
      ++out.rows;
      out.cols = f.linear->weight.cols;
      if (f.linear->bias.size == 0) continue;
      has_bias = true;
      (b == 0 ? bias[i].x : bias[i].y) = f.linear->bias.data[f.row];
    }
  const int64_t units = (out.cols + 4 * kUnit - 1) / (4 * kUnit) * 4;
  out.stride = units * kUnit;
  if (has_bias)
    out.bias = reinterpret_cast<const float2*>(
        store_floats(ctx, &bias.data()->x, 2 * static_cast<int64_t>(bias.size())));

  const int64_t n = static_cast<int64_t>(pairs.size());
  for (int64_t begin = 0; begin < n;) {
    // As many pairs as have one type: parts end where the type changes, at a tile's border.
    const DType type = type_of(pairs[begin], DType::F32);
    int64_t end = begin;
    while (end < n && type_of(pairs[end], type) == type) ++end;
    if (end < n && end % kTilePairs != 0)
      throw UnsupportedError(std::string(name) + ": the CUDA backend takes layers of several types by " +
                             std::to_string(2 * kTilePairs) + " features");
    const RowAddresses addresses(pairs, begin, end, type, buffers);
    PackedMatrix m;
    m.type = packed_type(type);
    m.tiles = static_cast<int32_t>((end - begin + kTilePairs - 1) / kTilePairs);
    m.units = static_cast<int32_t>(units);
    m.first_pair = static_cast<int32_t>(begin);
    const PackedFormat format(dtype_traits(m.type).format);
    const int64_t low = m.tiles * format.low_bytes(units), high = m.tiles * format.high_bytes(units),
                  scales = m.tiles * format.scale_bytes(units),
                  minima = m.tiles * format.minimum_bytes(units),
                  supers = m.tiles * format.super_bytes(units), all = low + high + scales + minima + supers;
    uint8_t* at = ctx.allocate_weights(all);
    const PackRows p{out.cols,
                     reinterpret_cast<const uint8_t* const*>(buffers.addresses.as()),
                     m.tiles,
                     units,
                     at,
                     at + low,
                     at + low + high,
                     at + low + high + scales,
                     at + low + high + scales + minima};
    visit_dtype(type, [&]<DType T>() {
      const int64_t threads = p.tiles * kTileSlots * (units * kUnit / kPackedAtOnce<T>);
      launch(ctx.stream, {"pack_rows", dim3(static_cast<unsigned>((threads + 127) / 128)), 128}, pack_rows<T>,
             p);
    });
    ctx.synchronize();  // the buffers are needed again
    m.low = p.low;
    m.high = p.high;
    m.scales = reinterpret_cast<const uint2*>(p.scales);
    m.minima = reinterpret_cast<const uint2*>(p.minima);
    m.supers = p.supers;
    out.bytes += all;
    out.parts.push_back(m);
    begin = end;
  }
  return out;
}

StoredLinear store(Context& ctx, const char* name, const qwen2vl_linear& linear) {
  const qwen2vl_matrix& m = linear.weight;
  StoredLinear out{name,    static_cast<DType>(m.type),
                   nullptr, row_bytes(static_cast<DType>(m.type), m.cols),
                   m.rows,  m.cols,
                   nullptr};
  uint8_t* at = ctx.allocate_weights(m.rows * out.row_bytes);
  check(cudaMemcpy(at, m.data, static_cast<size_t>(m.rows * out.row_bytes), cudaMemcpyDefault),
        "copying weights to the device");
  out.weight = at;
  if (linear.bias.size > 0) out.bias = store_floats(ctx, linear.bias.data, linear.bias.size);
  return out;
}

const float* store_floats(Context& ctx, const float* values, int64_t n) {
  auto* at = reinterpret_cast<float*>(ctx.allocate_weights(n * 4));
  check(cudaMemcpy(at, values, static_cast<size_t>(n) * 4, cudaMemcpyDefault),
        "copying weights to the device");
  return at;
}

void many_rows_linear(Context& ctx, const PackedLinear& linear, const uint16_t* x, int64_t rows,
                      Finish finish, Epilogue epilogue, DeviceBuffer& expanded) {
  const auto stage = ctx.stage(linear.name, linear.work(rows));
  epilogue.bias = linear.bias;
  for (const PackedMatrix& m : linear.parts) {
    const int64_t features = static_cast<int64_t>(m.tiles) * kTileSlots;
    expanded.resize(features * linear.stride * 2);
    visit_packed(m.type, [&]<DType T>() {
      launch(ctx.stream,
             {"expand_rows", dim3(static_cast<unsigned>((m.units + 3) / 4), static_cast<unsigned>(m.tiles)),
              128, 0},
             expand_rows<T>, m, expanded.as<uint16_t>());
    });
    ManyRows p{x,
               expanded.as<uint16_t>(),
               static_cast<int32_t>(rows),
               static_cast<int32_t>(features),
               static_cast<int32_t>(linear.stride),
               m.first_pair,
               epilogue};
    if (ctx.has_wgmma && wgmma_rows(ctx, linear.name, p, finish)) continue;
    const Launch how{linear.name,
                     dim3(static_cast<unsigned>((rows + kManyRowsTile - 1) / kManyRowsTile),
                          static_cast<unsigned>((features + kManyRowsTile - 1) / kManyRowsTile)),
                     256, kManyRowsSharedBytes};
    switch (finish) {
      case Finish::Store:
        launch(ctx.stream, how, many_rows<Finish::Store>, p);
        break;
      case Finish::StoreBf16:
        launch(ctx.stream, how, many_rows<Finish::StoreBf16>, p);
        break;
      case Finish::Residual:
        launch(ctx.stream, how, many_rows<Finish::Residual>, p);
        break;
      case Finish::SwiGlu:
        launch(ctx.stream, how, many_rows<Finish::SwiGlu>, p);
        break;
      case Finish::QuickGelu:
        launch(ctx.stream, how, many_rows<Finish::QuickGelu>, p);
        break;
      case Finish::Gelu:
        launch(ctx.stream, how, many_rows<Finish::Gelu>, p);
        break;
      case Finish::TextQkv:
        launch(ctx.stream, how, many_rows<Finish::TextQkv>, p);
        break;
      case Finish::VisionQkv:
        launch(ctx.stream, how, many_rows<Finish::VisionQkv>, p);
        break;
    }
  }
}

void norm(Context& ctx, const char* name, const Norm& p) {
  const auto stage = ctx.stage(name);
  const bool whole = p.width % 4 == 0 && p.stride % 4 == 0;
  const int vectors = !whole || p.width > 4096 ? 0 : p.width <= 1536 ? 12 : 32;
  const int warps = p.rows >= 1024 ? 8 : 1;
  launch(ctx.stream, {name, dim3(static_cast<unsigned>((p.rows + warps - 1) / warps)), 32 * warps, 0, true},
         vectors == 12   ? norm_rows<12>
         : vectors == 32 ? norm_rows<32>
                         : norm_rows<0>,
         p);
}

void plain_linear_rows(Context& ctx, const StoredLinear& linear, const float* x, int64_t x_stride,
                       int64_t rows, float* out, int64_t stride, bool accumulate) {
  const double n =
      static_cast<double>(rows) * static_cast<double>(linear.rows) * static_cast<double>(linear.cols);
  const auto stage = ctx.stage(
      linear.name, {0, 2 * n, static_cast<double>(linear.rows) * static_cast<double>(linear.row_bytes)});
  // The weights of some features at a time: 64 MiB of float32.
  const int64_t some = std::max<int64_t>((int64_t{16} << 20) / linear.cols / kPlainTile, 1) * kPlainTile;
  for (int64_t first = 0; first < linear.rows; first += some) {
    const int32_t features = static_cast<int32_t>(std::min(some, linear.rows - first));
    ctx.dequantized.resize(features * linear.cols * 4);
    const Dequantize d{linear.weight + first * linear.row_bytes, linear.row_bytes, features,
                       static_cast<int32_t>(linear.cols), ctx.dequantized.as<float>()};
    visit_dtype(linear.type, [&]<DType T>() {
      const int64_t pieces = (linear.cols + RowPiece<T>::kColumns - 1) / RowPiece<T>::kColumns;
      launch(ctx.stream,
             {"dequantize_rows", dim3(static_cast<unsigned>((features * pieces + 127) / 128)), 128},
             dequantize_rows<T>, d);
    });
    const PlainLinear p{d.out,
                        linear.bias == nullptr ? nullptr : linear.bias + first,
                        x,
                        x_stride,
                        static_cast<int32_t>(rows),
                        static_cast<int32_t>(linear.cols),
                        features,
                        out + first,
                        stride,
                        accumulate ? 1 : 0};
    launch(ctx.stream,
           {linear.name,
            dim3(static_cast<unsigned>((features + kPlainTile - 1) / kPlainTile),
                 static_cast<unsigned>((rows + kPlainTile - 1) / kPlainTile)),
            256, 2 * kPlainTile * (kPlainTile + 1) * 4},
           plain_linear, p);
  }
}

}  // namespace qwen2vl::cuda
