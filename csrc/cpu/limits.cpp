#include "cpu/limits.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"

namespace qwen2vl::cpu {
namespace {

constexpr double kRoundSeconds = 0.02;  // many times what waking a thread takes, a fraction of a time slice
constexpr int64_t kReadBytes = int64_t{512} << 20;  // more than last-level caches hold

class Measurement {
 public:
  Measurement(int n_threads, double seconds) : pool_(n_threads), seconds_(seconds) {}

  /// Operations a second of a loop that every thread runs.
  double ops(double (*loop)(int64_t)) {
    int64_t iterations = 1000;
    while (time([&] { loop(iterations); }) < kRoundSeconds) iterations *= 2;
    const double per_thread = loop(iterations);
    return per_thread * pool_.size() / best([&] { on_every_thread([&] { loop(iterations); }); });
  }

  /// Bytes a second of reading memory: in pieces claimed as threads come, as the matmul of one row does, and
  /// in one piece a thread, whichever is faster.
  double read(uint64_t (*loop)(const uint8_t*, size_t)) {
    const AlignedBuffer memory(kReadBytes);
    pool_.parallel_for(kReadBytes, kPiece, [&](int64_t begin, int64_t end, int thread) {
      std::memset(memory.data() + begin, thread + 1, end - begin);
    });
    const int64_t share = kReadBytes / pool_.size() / kPiece * kPiece;
    const auto reading = [&](int64_t bytes, int64_t grain) {
      const double seconds = best([&] {
        pool_.parallel_for(bytes, grain, [&](int64_t begin, int64_t end, int) {
          volatile uint64_t sink = loop(memory.data() + begin, end - begin);
          (void)sink;
        });
      });
      return static_cast<double>(bytes) / seconds;
    };
    return std::max(reading(kReadBytes, kPiece), reading(share * pool_.size(), share));
  }

 private:
  static constexpr int64_t kPiece = int64_t{256} << 10;

  static double time(const std::function<void()>& run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  double best(const std::function<void()>& run) const {
    run();  // threads awake, clocks up
    double least = time(run);
    for (double total = least; total < seconds_;) {
      const double taken = time(run);
      least = std::min(least, taken);
      total += taken;
    }
    return least;
  }

  void on_every_thread(const std::function<void()>& run) {
    pool_.parallel_for(pool_.size(), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) run();
    });
  }

  ThreadPool pool_;
  double seconds_;
};

}  // namespace

MachineLimits measure_limits(const KernelTable& kernels, int n_threads, double seconds) {
  Measurement measurement(n_threads, seconds);
  const PeakLoops& loops = kernels.peaks;
  MachineLimits limits;
  limits.int8_ops = measurement.ops(loops.int8_dot);
  limits.fp32_ops = measurement.ops(loops.fp32_fma);
  limits.float_ops = loops.float_dot == loops.fp32_fma ? limits.fp32_ops : measurement.ops(loops.float_dot);
  limits.read_bytes = measurement.read(loops.read);
  return limits;
}

}  // namespace qwen2vl::cpu
