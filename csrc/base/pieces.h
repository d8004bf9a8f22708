#pragma once

#include <coroutine>
#include <cstdint>
#include <stdexcept>
#include <utility>

namespace qwen2vl {

/// Work that is done piece by piece: a coroutine that yields how much of it is done. What it has on its way
/// lives in it, and goes when it ends or is dropped.
class Pieces {
 public:
  struct promise_type {
    int64_t done = 0;

    Pieces get_return_object() { return Pieces(std::coroutine_handle<promise_type>::from_promise(*this)); }
    std::suspend_always initial_suspend() noexcept { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    std::suspend_always yield_value(int64_t value) noexcept {
      done = value;
      return {};
    }
    void return_void() noexcept {}
    void unhandled_exception() { throw; }
  };

  Pieces(Pieces&& other) noexcept
      : coroutine_(std::exchange(other.coroutine_, nullptr)), failed_(other.failed_) {}
  Pieces& operator=(Pieces&&) = delete;
  ~Pieces() {
    if (coroutine_) coroutine_.destroy();
  }

  /// Does one more; false once all is done. What a piece throws comes out and ends the work.
  bool next() {
    if (failed_) throw std::logic_error("the work has failed");
    if (coroutine_.done()) return false;
    failed_ = true;
    coroutine_.resume();
    failed_ = false;
    return !coroutine_.done();
  }
  int64_t done() const { return coroutine_.promise().done; }

 private:
  explicit Pieces(std::coroutine_handle<promise_type> coroutine) : coroutine_(coroutine) {}

  std::coroutine_handle<promise_type> coroutine_;
  bool failed_ = false;
};

}  // namespace qwen2vl
