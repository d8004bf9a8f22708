#include <algorithm>
#include <map>

#include "cuda/kernels/few_rows.cuh"
#include "cuda/kernels/many_rows.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/pack.cuh"
#include "cuda/kernels/plain.cuh"
#include "cuda/linear.h"
#include "cuda/wgmma.h"

namespace qwen2vl::cuda {
namespace {

Format format_of(DType type) {
  switch (type) {
    case DType::Q4_0:
      return Format::Nibbles;
    case DType::Q8_0:
      return Format::Bytes;
    case DType::Q6_K:
      return Format::Sixes;
    case DType::F32:
    case DType::F16:
    case DType::BF16:
      return Format::Bf16;
    default:
      throw UnsupportedError("the CUDA backend has no kernel for tensors of type " +
                             std::string(dtype_traits(type).name));
  }
}

DType type_of(const Feature& feature, DType otherwise) {
  return feature.linear == nullptr ? otherwise : static_cast<DType>(feature.linear->weight.type);
}

/// Calls fn with the format as a compile-time constant.
template <typename Fn>
void with_format(Format format, const Fn& fn) {
  switch (format) {
    case Format::Nibbles:
      return fn(std::integral_constant<Format, Format::Nibbles>());
    case Format::Bytes:
      return fn(std::integral_constant<Format, Format::Bytes>());
    case Format::Sixes:
      return fn(std::integral_constant<Format, Format::Sixes>());
    case Format::Bf16:
      return fn(std::integral_constant<Format, Format::Bf16>());
  }
}

/// Uploads the matrices that `pairs` [begin, end) read and writes the address of every slot's row.
class RowAddresses {
 public:
  RowAddresses(const Pairs& pairs, int64_t begin, int64_t end, PackingBuffers& buffers) {
    std::map<const uint8_t*, std::pair<int64_t, const qwen2vl_matrix*>> places;  // data -> offset
    int64_t bytes = 0;
    const auto size = [&](const qwen2vl_matrix& m) {
      return m.rows * row_bytes(static_cast<DType>(m.type), m.cols);
    };
    for (int64_t i = begin; i < end; ++i)
      for (const Feature* f : {&pairs[i].first, &pairs[i].second})
        if (f->linear != nullptr &&
            places.try_emplace(f->linear->weight.data, bytes, &f->linear->weight).second)
          bytes += (size(f->linear->weight) + 255) / 256 * 256;
    buffers.raw.resize(bytes);
    for (const auto& [data, place] : places)
      check(cudaMemcpy(buffers.raw.as() + place.first, data, static_cast<size_t>(size(*place.second)),
                       cudaMemcpyHostToDevice),
            "copying weights to the device");
    const int64_t tiles = (end - begin + kTilePairs - 1) / kTilePairs;
    addresses_.assign(tiles * kTileSlots, nullptr);
    for (int64_t i = begin; i < end; ++i)
      for (int b = 0; b < 2; ++b) {
        const Feature& f = b == 0 ? pairs[i].first : pairs[i].second;
        if (f.linear == nullptr) continue;
        const qwen2vl_matrix& m = f.linear->weight;
        addresses_[(i - begin) / kTilePairs * kTileSlots + 8 * b + (i - begin) % kTilePairs] =
            buffers.raw.as() + places.at(m.data).first +
            f.row * row_bytes(static_cast<DType>(m.type), m.cols);
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
    DType type = type_of(pairs[begin].first, DType::F32);
    int64_t end = begin;
    while (end < n && type_of(pairs[end].first, type) == type && type_of(pairs[end].second, type) == type)
      ++end;
    if (end < n && (end == begin || end % kTilePairs != 0))
      throw UnsupportedError(std::string(name) +
                             ": the CUDA backend cannot run gate and up projections of different types");
    const RowAddresses addresses(pairs, begin, end, buffers);
    PackedMatrix m;
    m.format = format_of(type);
    m.tiles = static_cast<int32_t>((end - begin + kTilePairs - 1) / kTilePairs);
    m.units = static_cast<int32_t>(units);
    m.first_pair = static_cast<int32_t>(begin);
    const int64_t all = static_cast<int64_t>(m.tiles) * units;
    const int64_t quants = all * 32 * 16 * quant_vectors(m.format);
    const int64_t high = m.format == Format::Sixes ? all * 32 * 8 : 0;
    const int64_t scales = m.format == Format::Bf16 ? 0 : all * 8 * 8;
    const int64_t supers = m.format == Format::Sixes ? all / 4 * 8 * 4 : 0;
    uint8_t* at = ctx.allocate_weights(quants + high + scales + supers);
    PackRows p{type,
               out.cols,
               reinterpret_cast<const uint8_t* const*>(buffers.addresses.as()),
               m.tiles,
               m.units,
               reinterpret_cast<uint4*>(at),
               reinterpret_cast<uint2*>(at + quants),
               reinterpret_cast<uint2*>(at + quants + high),
               reinterpret_cast<uint32_t*>(at + quants + high + scales)};
    // The grid's second side ends at 65,535.
    for (int32_t first = 0; first < m.tiles; first += 32768) {
      PackRows some = p;
      some.tiles = std::min(m.tiles - first, 32768);
      const int64_t skipped = static_cast<int64_t>(first) * units;
      some.rows += static_cast<int64_t>(first) * kTileSlots;
      some.quants += skipped * 32 * quant_vectors(m.format);
      some.high += skipped * 32;
      some.scales += skipped * 8;
      some.supers += skipped / 4 * 8;
      launch(ctx.stream,
             {"pack_rows", dim3(static_cast<unsigned>(units), static_cast<unsigned>(some.tiles)), 32},
             pack_rows, some);
    }
    ctx.synchronize();  // the buffers are needed again
    m.quants = p.quants;
    m.high = p.high;
    m.scales = p.scales;
    m.supers = p.supers;
    out.bytes += quants + high + scales + supers;
    out.parts.push_back(m);
    begin = end;
  }
  return out;
}

StoredLinear store(Context& ctx, const char* name, const qwen2vl_linear& linear) {
  const qwen2vl_matrix& m = linear.weight;
  format_of(static_cast<DType>(m.type));  // refuses what the kernels do not read
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

void few_rows_linear(Context& ctx, const PackedLinear& linear, const FewInput& input, int64_t rows,
                     Finish finish, Epilogue epilogue) {
  const auto stage = ctx.stage(linear.name, linear.work(rows));
  epilogue.bias = linear.bias;
  for (const PackedMatrix& m : linear.parts) {
    // Enough warps that a matrix of few tiles is read by all of the chip; more would have too little to do.
    const int warps = m.units >= 64   ? 16
                      : m.tiles > 512 ? std::clamp(m.units / 6, 1, 4)
                                      : std::clamp(m.units / 3, 1, 8);
    FewRows p;
    p.m = m;
    p.rows = static_cast<int32_t>(rows);
    p.input = input.half;
    p.x = input.x;
    p.norm = input.norm;
    p.eps = input.eps;
    p.width = static_cast<int32_t>(linear.cols);
    p.finish = finish;
    p.epilogue = epilogue;
    const int row_tiles = rows <= 8 ? 1 : 4;
    // Rows of a layer of 29,568 inputs do not fit shared memory eight at a time.
    const bool shared = row_tiles == 1 && few_rows_shared_bytes(p, warps, 1, true) <=
                                              static_cast<int64_t>(ctx.properties.sharedMemPerBlockOptin);
    if (!shared && input.x != nullptr)
      throw UnsupportedError(std::string(linear.name) + ": " + std::to_string(linear.cols) +
                             " inputs are more than the CUDA backend normalizes in shared memory");
    const int64_t shared_bytes = few_rows_shared_bytes(p, warps, row_tiles, shared);
    with_format(m.format, [&](auto format) {
      constexpr Format kFormat = decltype(format)::value;
      const auto kernel =
          row_tiles == 4 ? (warps > 8 ? few_rows<kFormat, 4, false, 512> : few_rows<kFormat, 4, false, 256>)
          : !shared      ? few_rows<kFormat, 1, false, 512>
          : warps > 8    ? few_rows<kFormat, 1, true, 512>
                         : few_rows<kFormat, 1, true, 256>;
      const int resident =
          ctx.resident_blocks(reinterpret_cast<const void*>(kernel), warps * 32, shared_bytes);
      const int at_once = tiles_at_once(kFormat, row_tiles, 32 * warps),
                tiles = (m.tiles + at_once - 1) / at_once;
      const int turns = (tiles + resident - 1) / resident;
      launch(ctx.stream,
             {linear.name,
              dim3(static_cast<unsigned>((tiles + turns - 1) / turns),
                   static_cast<unsigned>((rows + 8 * row_tiles - 1) / (8 * row_tiles))),
              warps * 32, shared_bytes, true},
             kernel, p);
    });
  }
}

void many_rows_linear(Context& ctx, const PackedLinear& linear, const uint16_t* x, int64_t rows,
                      Finish finish, Epilogue epilogue, DeviceBuffer& expanded) {
  const auto stage = ctx.stage(linear.name, linear.work(rows));
  epilogue.bias = linear.bias;
  for (const PackedMatrix& m : linear.parts) {
    const int64_t features = static_cast<int64_t>(m.tiles) * kTileSlots;
    expanded.resize(features * linear.stride * 2);
    with_format(m.format, [&](auto format) {
      launch(ctx.stream,
             {"expand_rows", dim3(static_cast<unsigned>((m.units + 3) / 4), static_cast<unsigned>(m.tiles)),
              128, 0},
             expand_rows<format.value>, m, expanded.as<uint16_t>());
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
  const PlainLinear p{linear.type,
                      linear.weight,
                      linear.row_bytes,
                      linear.bias,
                      x,
                      x_stride,
                      static_cast<int32_t>(rows),
                      static_cast<int32_t>(linear.cols),
                      static_cast<int32_t>(linear.rows),
                      out,
                      stride,
                      accumulate ? 1 : 0};
  launch(ctx.stream,
         {linear.name,
          dim3(static_cast<unsigned>((linear.rows + kPlainTile - 1) / kPlainTile),
               static_cast<unsigned>((rows + kPlainTile - 1) / kPlainTile)),
          256, 2 * kPlainTile * (kPlainTile + 1) * 4},
         plain_linear, p);
}

}  // namespace qwen2vl::cuda
