#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace qwen2vl {

/// Physical cores that this process may use, of the fast kind where there are two (cpu_count.h): affinity
/// mask and cgroup CPU quota respected, SMT siblings counted once. At least 1.
int default_thread_count();

/// A fixed set of threads for data-parallel loops. The calling thread takes part. Workers spin for a few
/// microseconds between loops of one forward pass, then sleep: an idle pool uses no CPU. A worker that the
/// system does not run in time is not waited for: the others do its share. A forked process starts its own
/// threads at its first loop.
class ThreadPool {
 public:
  static constexpr int kMaxThreads = 1024;  ///< beyond any machine: a number was mistyped

  /// `n_threads` threads in all, the caller's included; 1 means no worker. Throws std::invalid_argument for a
  /// number out of range, Error where the system does not give so many.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(shares_.size()); }

  /// Splits [0, n) into chunks of `grain` (the last may be shorter) and calls fn(begin, end, thread) for
  /// each, with thread in 0..size()-1; returns when all are done. Every thread has an equal share of
  /// neighbouring chunks, which it goes through in order, and then takes over what others have not begun. The
  /// first exception is rethrown here after all threads have stopped. Not reentrant; one caller at a time.
  void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t, int)>& fn);

 private:
  static constexpr int kClosed = 1 << 30;

  /// A thread's share of the chunks, on a cache line of its own.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void start();
  void stop();
  void leave_behind();
  void worker(int index);
  bool enter();
  void leave();
  void run_chunks(int index);

  uint32_t forks_ = 0;  // fork_count() where the workers were started
  std::vector<std::thread> workers_;
  const std::function<void(int64_t, int64_t, int)>* fn_ = nullptr;
  int64_t n_ = 0;
  int64_t grain_ = 1;
  std::vector<Share> shares_;            // one a thread
  std::atomic<uint32_t> generation_{0};  // of loops
  std::atomic<int> inside_;              // workers in the loop, and kClosed where no other may enter
  std::atomic<bool> stop_{false};
  std::exception_ptr error_;
  std::mutex error_mutex_;
};

}  // namespace qwen2vl
