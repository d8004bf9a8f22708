#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <ctime>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "base/thread_pool.h"

using namespace qwen2vl;

TEST_CASE("a loop visits every index once, in chunks of the grain, on threads of the pool") {
  for (const int n_threads : {1, 2, 3, 8}) {
    ThreadPool pool(n_threads);
    CHECK(pool.size() == n_threads);
    for (const int64_t n : {0, 1, 2, 7, 64, 1000}) {
      for (const int64_t grain : {-1, 1, 3, 64, 5000}) {
        CAPTURE(n_threads);
        CAPTURE(n);
        CAPTURE(grain);
        std::vector<std::atomic<int>> visits(static_cast<size_t>(n));
        std::atomic<int> bad_chunks{0};
        pool.parallel_for(n, grain, [&](int64_t begin, int64_t end, int thread) {
          const int64_t length = std::max<int64_t>(grain, 1);
          const bool whole = end - begin == length || (end == n && end > begin && end - begin < length);
          if (!whole || begin % length != 0 || thread < 0 || thread >= n_threads) ++bad_chunks;
          for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
        });
        CHECK(bad_chunks == 0);
        CHECK(std::all_of(visits.begin(), visits.end(), [](const auto& count) { return count == 1; }));
      }
    }
  }
}

TEST_CASE("the workers do take part, each under its own number") {
  ThreadPool pool(3);
  std::array<std::thread::id, 3> ids;
  std::atomic<int> arrived{0};
  pool.parallel_for(3, 1, [&](int64_t, int64_t, int thread) {  // ends only once three threads are in it
    ids[static_cast<size_t>(thread)] = std::this_thread::get_id();
    ++arrived;
    while (arrived < 3) std::this_thread::yield();
  });
  CHECK(ids[0] == std::this_thread::get_id());
  CHECK(ids[1] != ids[0]);
  CHECK(ids[2] != ids[0]);
  CHECK(ids[1] != ids[2]);
}

TEST_CASE("a thread that is done takes over what another has not begun") {
  ThreadPool pool(2);
  std::atomic<int> done{0};
  int done_before_first = 0;
  pool.parallel_for(8, 1, [&](int64_t begin, int64_t, int) {
    if (begin == 0) {  // ends when all others have, the other three of the caller's share too
      const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (done < 7 && std::chrono::steady_clock::now() < give_up) std::this_thread::yield();
      done_before_first = done;
    }
    ++done;
  });
  CHECK(done_before_first == 7);
}

TEST_CASE("what a loop wrote is seen after it, loop after loop, and after a pause") {
  ThreadPool pool(4);
  std::vector<int64_t> values(1000, 0);  // not atomic: parallel_for orders the accesses
  for (int loop = 0; loop < 2000; ++loop) {
    pool.parallel_for(1000, 50, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) ++values[static_cast<size_t>(i)];
    });
    // Long enough for the workers to fall asleep, now and then.
    if (loop % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  CHECK(std::accumulate(values.begin(), values.end(), int64_t{0}) == 2000 * 1000);
}

TEST_CASE("an exception reaches the caller, stops the loop, and leaves the pool usable") {
  for (const int n_threads : {1, 4}) {
    ThreadPool pool(n_threads);
    std::atomic<int> chunks{0};
    const auto failing = [&](int64_t begin, int64_t, int) {
      ++chunks;
      if (begin == 5) throw std::runtime_error("chunk 5");
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    };
    CHECK_THROWS_WITH_AS(pool.parallel_for(100000, 1, failing), "chunk 5", std::runtime_error);
    CHECK(chunks < 5000);
    int64_t sum = 0;
    pool.parallel_for(10, 100, [&](int64_t begin, int64_t end, int) { sum += end - begin; });
    CHECK(sum == 10);
  }
}

TEST_CASE("where several threads fail at once, one exception comes out") {
  ThreadPool pool(4);
  for (int loop = 0; loop < 50; ++loop) {
    std::atomic<int> arrived{0};
    CHECK_THROWS_AS(pool.parallel_for(4, 1,
                                      [&](int64_t, int64_t, int) {  // once all four are in it
                                        ++arrived;
                                        while (arrived < 4) std::this_thread::yield();
                                        throw std::runtime_error("all");
                                      }),
                    std::runtime_error);
  }
}

#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)  // which knows no threads made after a fork

TEST_CASE("a forked process has threads of its own") {
  ThreadPool pool(3);
  const auto sum = [&] {
    std::array<int64_t, 3> sums{};
    std::atomic<int> arrived{0};
    pool.parallel_for(3, 1, [&](int64_t begin, int64_t, int thread) {  // ends once three threads are in it
      sums[static_cast<size_t>(thread)] = begin;
      ++arrived;
      while (arrived < 3) std::this_thread::yield();
    });
    return static_cast<int>(sums[0] + sums[1] + sums[2]);
  };
  const auto in_a_child = [](const auto& fn) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(30);
      ::_exit(fn());
    }
    int status = 0;
    return ::waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  };
  CHECK(sum() == 3);
  CHECK(in_a_child([&] { return sum() + sum() + in_a_child(sum); }) == 9);
  CHECK(in_a_child([] { return (ThreadPool(2), 1); }) == 1);
  CHECK(in_a_child([&] {
          pool.~ThreadPool();  // waits for nobody
          return 1;
        }) == 1);
  CHECK(sum() == 3);
}

#endif

#ifndef _WIN32  // where std::clock() is the wall's

TEST_CASE("an idle pool uses no processor time") {
  ThreadPool pool(4);
  pool.parallel_for(100, 1, [](int64_t, int64_t, int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const std::clock_t before = std::clock();  // of all threads of the process
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC < 0.05);
}

#endif

TEST_CASE("the number of threads is checked") {
  CHECK_THROWS_AS(ThreadPool(0), std::invalid_argument);
  CHECK_THROWS_AS(ThreadPool(-3), std::invalid_argument);
  CHECK_THROWS_AS(ThreadPool(1 << 20), std::invalid_argument);
  CHECK(default_thread_count() >= 1);
  CHECK(default_thread_count() <= static_cast<int>(std::thread::hardware_concurrency()));
}
