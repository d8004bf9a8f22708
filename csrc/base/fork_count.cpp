#include "base/fork_count.h"

#include <atomic>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace qwen2vl {
namespace {

std::atomic<uint32_t> forks{0};

#ifndef _WIN32
[[maybe_unused]] const int registered =
    ::pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
#endif

}  // namespace

uint32_t fork_count() { return forks.load(std::memory_order_relaxed); }

}  // namespace qwen2vl
