#include "base/call_lock.h"

#include "base/error.h"
#include "base/fork_count.h"

namespace qwen2vl {

bool CallLock::try_lock() {
  uint32_t found = 0;
  if (!state_.compare_exchange_strong(found, fork_count() + 1, std::memory_order_acquire)) return false;
  holder_.store(std::this_thread::get_id(), std::memory_order_relaxed);
  return true;
}

void CallLock::lock() {
  while (!try_lock()) {
    if (holder_.load(std::memory_order_relaxed) == std::this_thread::get_id())
      throw Error("a call of the model is under way in this thread: its callback cannot make another");
    const uint32_t found = state_.load(std::memory_order_relaxed);
    if (found == 0) continue;
    if (found != fork_count() + 1)
      throw Error(
          "another thread was computing with the model when this process was forked: load it again here");
    state_.wait(found, std::memory_order_relaxed);
  }
}

void CallLock::unlock() {
  holder_.store({}, std::memory_order_relaxed);
  state_.store(0, std::memory_order_release);
  state_.notify_one();
}

}  // namespace qwen2vl
