#include "base/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#if defined(_M_X64) || defined(_M_ARM64)
#include <intrin.h>
#elif defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "base/error.h"
#include "base/fork_count.h"
#include "base/printable.h"

namespace qwen2vl {
namespace {

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
  start();
}

ThreadPool::~ThreadPool() {
  if (forks_ == fork_count())
    stop();
  else
    leave_behind();
}

void ThreadPool::start() {
  forks_ = fork_count();
  generation_.store(0, std::memory_order_relaxed);
  inside_.store(kClosed, std::memory_order_relaxed);
  workers_.reserve(shares_.size() - 1);
  try {
    for (int index = 1; index < size(); ++index) workers_.emplace_back([this, index] { worker(index); });
  } catch (const std::system_error& error) {
    const size_t made = workers_.size() + 1;
    stop();
    throw Error("n_threads: expected " + std::to_string(size()) + " threads, the system gives only " +
                std::to_string(made) + ": " + printable(error.code().message()));
  } catch (...) {
    stop();
    throw;
  }
}

void ThreadPool::stop() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& thread : workers_) thread.join();
  workers_.clear();
  stop_.store(false, std::memory_order_relaxed);
}

/// Of threads that a forked process lacks no handle can be joined, detached or destroyed.
void ThreadPool::leave_behind() { new std::vector<std::thread>(std::exchange(workers_, {})); }

void ThreadPool::parallel_for(int64_t n, int64_t grain,
                              const std::function<void(int64_t, int64_t, int)>& fn) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (shares_.size() == 1 || n <= grain) {
    for (int64_t begin = 0; begin < n; begin += grain) fn(begin, std::min(begin + grain, n), 0);
    return;
  }
  if (forks_ != fork_count()) {
    leave_behind();
    start();
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
  inside_.store(0, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  run_chunks(0);
  inside_.fetch_or(kClosed, std::memory_order_relaxed);
  for (int left; (left = inside_.load(std::memory_order_acquire)) != kClosed;) wait_for_change(inside_, left);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::worker(int index) {
  for (uint32_t seen = 0;;) {
    wait_for_change(generation_, seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;
    if (!enter()) continue;
    run_chunks(index);
    leave();
  }
}

/// Into the loop that is open, if one is: possibly a later one than what woke this thread.
bool ThreadPool::enter() {
  int inside = inside_.load(std::memory_order_relaxed);
  while ((inside & kClosed) == 0)
    if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) return true;
  return false;
}

void ThreadPool::leave() {
  if (inside_.fetch_sub(1, std::memory_order_release) == kClosed + 1) inside_.notify_one();
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
