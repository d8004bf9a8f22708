#include <doctest/doctest.h>

#include <mutex>
#include <thread>
#include <vector>

#include "base/call_lock.h"
#include "base/error.h"

#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#endif

using namespace qwen2vl;

TEST_CASE("one thread at a time") {
  CallLock lock;
  int64_t sum = 0;  // not atomic: the lock orders the accesses
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 20'000; ++i) {
        const std::lock_guard mine(lock);
        ++sum;
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(sum == 80'000);
}

TEST_CASE("who holds it is told, and holds it on") {
  CallLock lock;
  {
    const std::lock_guard mine(lock);
    CHECK_THROWS_AS(lock.lock(), Error);
    CHECK_THROWS_AS(lock.lock(), Error);
  }
  const std::lock_guard again(lock);
}

#ifndef _WIN32

namespace {

/// The exit status of a child that runs fn(), or -1.
template <typename Fn>
int in_a_child(const Fn& fn) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(30);
    ::_exit(fn());
  }
  int status = 0;
  return ::waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

TEST_CASE("a process that was forked while another thread held it is told") {
  CallLock lock;
  std::atomic<bool> held{false}, done{false};
  std::thread holder([&] {
    const std::lock_guard mine(lock);
    held = true;
    while (!done) std::this_thread::yield();
  });
  while (!held) std::this_thread::yield();
  const auto refused = [&] {
    try {
      const std::lock_guard mine(lock);
      return 1;
    } catch (const Error&) {
      return 0;
    }
  };
  CHECK(in_a_child([&] { return refused() + refused(); }) == 0);
  done = true;
  holder.join();
  CHECK(in_a_child([&] { return refused(); }) == 1);  // free at the fork
}

TEST_CASE("a process that was forked by who held it goes on") {
  CallLock lock;
  const auto unlock_and_lock = [&] {
    lock.unlock();
    const std::lock_guard again(lock);
    return 7;
  };
  lock.lock();
  CHECK(in_a_child(unlock_and_lock) == 7);
  CHECK(unlock_and_lock() == 7);
}

#endif
