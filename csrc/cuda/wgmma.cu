#include "cuda/wgmma.h"

#ifndef QWEN2VL_STAND_IN

#include <chrono>

#include "cuda/kernels/wgmma_attention.cuh"
#include "cuda/kernels/wgmma_rows.cuh"

namespace qwen2vl::cuda {
namespace {

/// A tensor of 16-bit values [rows][columns] of row_bytes, copied in boxes of box_rows x box_columns,
/// swizzled over the box's row.
CUtensorMap tensor_map(const uint16_t* at, int64_t columns, int64_t rows, int64_t row_bytes, int box_columns,
                       int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result),
        "looking for cuTensorMapEncodeTiled");
    if (entry == nullptr || result != cudaDriverEntryPointSuccess)
      throw DeviceError("the NVIDIA driver has no cuTensorMapEncodeTiled: it is too old");
    return reinterpret_cast<Encode>(entry);
  }();
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<uint16_t*>(at), sizes,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw DeviceError("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)) + " for " +
                      std::to_string(rows) + " rows of " + std::to_string(columns));
  return map;
}

template <int kFeatures, int kStages>
void run(Context& ctx, const char* name, const ManyRows& p, Finish finish) {
  const CUtensorMap x =
      tensor_map(p.x, p.columns, p.rows, int64_t{2} * p.columns, kWgmmaStep, kWgmmaRows / 2);
  const CUtensorMap w =
      tensor_map(p.w, p.columns, p.features, int64_t{2} * p.columns, kWgmmaStep, kFeatures / 2);
  const auto tiles = [](int64_t n, int64_t each) {
    return static_cast<unsigned>((n + 2 * each - 1) / (2 * each) * 2);
  };
  const Launch how{name,
                   dim3(tiles(p.features, kFeatures), tiles(p.rows, kWgmmaRows)),
                   wgmma_rows_threads(kStages),
                   wgmma_rows_shared_bytes(kFeatures, kStages),
                   false,
                   2};
  switch (finish) {
    case Finish::Store:
      return launch(ctx.stream, how, wgmma_rows_kernel<Finish::Store, kFeatures, kStages>, x, w, p);
    case Finish::StoreBf16:
      return launch(ctx.stream, how, wgmma_rows_kernel<Finish::StoreBf16, kFeatures, kStages>, x, w, p);
    case Finish::Residual:
      return launch(ctx.stream, how, wgmma_rows_kernel<Finish::Residual, kFeatures, kStages>, x, w, p);
    case Finish::SwiGlu:
      return launch(ctx.stream, how, wgmma_rows_kernel<Finish::SwiGlu, kFeatures, kStages>, x, w, p);
    case Finish::QuickGelu:
      return launch(ctx.stream, how, wgmma_rows_kernel<Finish::QuickGelu, kFeatures, kStages>, x, w, p);
    case Finish::Gelu:
      return launch(ctx.stream, how, wgmma_rows_kernel<Finish::Gelu, kFeatures, kStages>, x, w, p);
    case Finish::TextQkv:
      return launch(ctx.stream, how, wgmma_rows_kernel<Finish::TextQkv, kFeatures, kStages>, x, w, p);
    case Finish::VisionQkv:
      return launch(ctx.stream, how, wgmma_rows_kernel<Finish::VisionQkv, kFeatures, kStages>, x, w, p);
  }
}

}  // namespace

bool wgmma_rows(Context& ctx, const char* name, const ManyRows& p, Finish finish) {
  const int64_t multiprocessors = ctx.properties.multiProcessorCount,
                rows = (p.rows + kWgmmaRows - 1) / kWgmmaRows;
  const auto tiles = [&](int64_t features) { return (p.features + features - 1) / features * rows; };
  // The last round of blocks, two a multiprocessor, may find little to do.
  const auto cost = [&](int64_t features) {
    return (tiles(features) + 2 * multiprocessors - 1) / (2 * multiprocessors) * features;
  };
  if (tiles(128) <= multiprocessors)
    run<128, 6>(ctx, name, p, finish);
  else if (cost(160) <= cost(128))
    run<160, 3>(ctx, name, p, finish);
  else
    run<128, 3>(ctx, name, p, finish);
  return true;
}

bool wgmma_attention(Context& ctx, const FlashAttention& p, int64_t head_dim, int64_t heads, int64_t steps) {
  if (head_dim != kHopperHeadDim || p.true_head_dim != kHopperHeadDim || p.transposed_values == nullptr)
    return false;
  const int64_t all_rows = p.rows * steps;
  const CUtensorMap wide = tensor_map(p.queries, 80, 2 * heads * all_rows, 160, 64, 64);
  const CUtensorMap narrow = tensor_map(p.queries, 80, 2 * heads * all_rows, 160, 16, 64);
  const CUtensorMap values = tensor_map(p.transposed_values, all_rows, heads * kHopperHeadDim,
                                        2 * p.transposed_stride, 64, kHopperHeadDim);
  launch(
      ctx.stream,
      {"image attention",
       dim3(static_cast<unsigned>((p.rows + kHopperQueries - 1) / kHopperQueries),
            static_cast<unsigned>(heads), static_cast<unsigned>(steps)),
       kHopperThreads, kHopperSharedBytes},
      wgmma_attention_kernel, wide, narrow, values,
      HopperAttention{p.rows, static_cast<int32_t>(all_rows), static_cast<int32_t>(heads), p.out, p.stride});
  return true;
}

double wgmma_peak(Context& ctx, double seconds) {
  if (!ctx.has_wgmma) return 0;
  DeviceBuffer never(256);
  constexpr int kRounds = 20000;
  const int blocks = ctx.properties.multiProcessorCount;
  const double work = 2.0 * kRounds * 4 * 2 * 64 * 160 * 16 * blocks;
  const auto start = std::chrono::steady_clock::now();
  double best = 0;
  do {
    const auto before = std::chrono::steady_clock::now();
    launch(ctx.stream, {"peak_wgmma", dim3(static_cast<unsigned>(blocks)), 256, 1024 + (128 + 160) * 128},
           peak_wgmma, kRounds, never.as<float>());
    ctx.synchronize();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - before;
    best = std::max(best, work / taken.count());
  } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(seconds));
  return best;
}

}  // namespace qwen2vl::cuda

#else  // the stand-in has no Hopper

namespace qwen2vl::cuda {

bool wgmma_rows(Context&, const char*, const ManyRows&, Finish) { return false; }
bool wgmma_attention(Context&, const FlashAttention&, int64_t, int64_t, int64_t) { return false; }
double wgmma_peak(Context&, double) { return 0; }

}  // namespace qwen2vl::cuda

#endif
