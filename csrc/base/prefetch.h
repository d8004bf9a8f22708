#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _MSC_VER
#include <intrin.h>
#endif

namespace qwen2vl {

/// Has what lies there brought into the caches, if the compiler knows how.
inline void prefetch(const uint8_t* data, size_t bytes) {
  constexpr size_t kLine = 64;
  for (size_t at = 0; at < bytes; at += kLine) {
#if defined(__GNUC__)
    __builtin_prefetch(data + at);
#elif defined(_M_X64)
    _mm_prefetch(reinterpret_cast<const char*>(data + at), _MM_HINT_T0);
#elif defined(_M_ARM64)
    __prefetch(data + at);
#endif
  }
}

}  // namespace qwen2vl
