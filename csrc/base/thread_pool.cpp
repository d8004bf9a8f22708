#include "base/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(_M_X64) || defined(_M_ARM64)
#include <intrin.h>
#elif defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace qwen2vl {
namespace {

constexpr int kMaxThreads = 1024;

// Longer than the gap between two loops of a forward pass (a few microseconds of serial work), shorter than
// what anyone would notice as a busy core.
constexpr std::chrono::microseconds kSpin{30};

void relax() {
#if defined(_M_X64) || defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(_M_ARM64)
  __yield();
#elif defined(__aarch64__) && defined(__GNUC__)
  asm volatile("yield");
#else
  std::this_thread::yield();
#endif
}

// Waits until `value` is no longer `old`: awake for kSpin, then asleep.
template <typename T>
void wait_for_change(const std::atomic<T>& value, T old) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {  // reading the clock costs as much as a few pauses
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) {
  if (n_threads < 1 || n_threads > kMaxThreads) {
    throw std::invalid_argument("the number of threads must be from 1 to " + std::to_string(kMaxThreads) +
                                ", not " + std::to_string(n_threads));
  }
  shares_ = std::vector<Share>(n_threads);
  workers_.reserve(static_cast<size_t>(n_threads) - 1);
  try {
    for (int index = 1; index < n_threads; ++index) workers_.emplace_back([this, index] { worker(index); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& thread : workers_) thread.join();
}

void ThreadPool::parallel_for(int64_t n, int64_t grain,
                              const std::function<void(int64_t, int64_t, int)>& fn) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (workers_.empty() || n <= grain) {
    for (int64_t begin = 0; begin < n; begin += grain) fn(begin, std::min(begin + grain, n), 0);
    return;
  }
  fn_ = &fn;
  n_ = n;
  grain_ = grain;
  error_ = nullptr;
  const int64_t chunks = (n - 1) / grain + 1;
  int64_t begin = 0;
  for (int i = 0; i < size(); ++i) {
    shares_[i].next.store(begin, std::memory_order_relaxed);
    shares_[i].end = begin = chunks * (i + 1) / size();
  }
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  run_chunks(0);
  for (int left; (left = running_.load(std::memory_order_acquire)) != 0;) wait_for_change(running_, left);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::worker(int index) {
  for (uint32_t seen = 0;;) {
    wait_for_change(generation_, seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;
    run_chunks(index);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

void ThreadPool::run_chunks(int index) {
  try {
    for (int i = 0; i < size(); ++i) {
      Share& share = shares_[(index + i) % size()];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t chunk = share.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= share.end) break;
        const int64_t begin = chunk * grain_;
        (*fn_)(begin, std::min(begin + grain_, n_), index);
      }
    }
  } catch (...) {
    for (Share& share : shares_)  // no chunk is begun any more
      share.next.store(share.end, std::memory_order_relaxed);
    const std::lock_guard lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

}  // namespace qwen2vl
