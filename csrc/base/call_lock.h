#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace qwen2vl {

/// A mutex for calls of a model, which call back. Where waiting would never end it throws Error instead: in
/// the thread that holds it, and in a process that was forked while another thread held it.
class CallLock {
 public:
  CallLock() = default;
  CallLock(const CallLock&) = delete;
  CallLock& operator=(const CallLock&) = delete;

  bool try_lock();  ///< false wherever it is held
  void lock();
  void unlock();

 private:
  std::atomic<uint32_t> state_{0};         // 0: free, else 1 + the fork_count() of the process that holds it
  std::atomic<std::thread::id> holder_{};  // none while it is free
};

}  // namespace qwen2vl
