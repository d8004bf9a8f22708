#include <algorithm>
#include <chrono>
#include <functional>

#include "cuda/context.h"
#include "cuda/kernels/peaks.cuh"
#include "cuda/kernels/step.cuh"
#include "cuda/limits.h"
#include "cuda/wgmma.h"

namespace qwen2vl::cuda {
namespace {

/// The best rate of rounds of `work` each.
double best_rate(Context& ctx, double seconds, double work, const std::function<void()>& round) {
  round();
  ctx.synchronize();
  const auto start = std::chrono::steady_clock::now();
  double best = 0;
  do {
    const auto before = std::chrono::steady_clock::now();
    round();
    ctx.synchronize();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - before;
    best = std::max(best, work / taken.count());
  } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(seconds));
  return best;
}

}  // namespace

qwen2vl_limits measure_limits(int device, double seconds) {
  Context ctx(device, 0);
  DeviceBuffer never(256);
  const int blocks = 8 * ctx.properties.multiProcessorCount;
  const dim3 grid(static_cast<unsigned>(blocks));
  qwen2vl_limits limits{};

  // Several times the second-level cache, read several times over: a launch is then nothing beside it.
  constexpr int64_t kBytes = int64_t{1} << 30;
  DeviceBuffer memory(kBytes);
  check(cudaMemsetAsync(memory.as(), 0x5a, kBytes, ctx.stream), "cudaMemset");
  limits.read_bytes = best_rate(ctx, seconds, 4.0 * kBytes, [&] {
    for (int i = 0; i < 4; ++i)
      launch(ctx.stream, {"read_memory", grid, 256}, read_memory, memory.as<const uint4>(), kBytes / 16,
             never.as<uint32_t>());
  });

  constexpr int kRounds = 20000;
  const double threads = 256.0 * blocks;
  limits.fp32_ops = best_rate(ctx, seconds, 2.0 * kRounds * kPeakChains * threads, [&] {
    launch(ctx.stream, {"peak_fma", grid, 256}, peak_fma, kRounds, never.as<float>());
  });
  limits.float_ops = best_rate(ctx, seconds, 2.0 * kRounds * kPeakChains * (threads / 32) * 16 * 8 * 16, [&] {
    launch(ctx.stream, {"peak_mma", grid, 256}, peak_mma, kRounds, never.as<float>());
  });
  limits.float_ops = std::max(limits.float_ops, wgmma_peak(ctx, seconds));
  return limits;
}

}  // namespace qwen2vl::cuda
