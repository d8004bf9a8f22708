#pragma once

#include <cstddef>
#include <cstdint>

/// What one core can do at most with an instruction set, as loops that do nothing else. Each function runs
/// `iterations` rounds and returns how many operations (a multiply and an add are two) it has done.
namespace qwen2vl::bench {

struct PeakLoops {
  double (*int8_dot)(int64_t iterations);
  double (*fp32_fma)(int64_t iterations);
  /// Reads `bytes` (a multiple of 4096) and returns something that depends on them.
  uint64_t (*read)(const uint8_t* data, size_t bytes);
};

PeakLoops peak_loops_avx2();
PeakLoops peak_loops_avx512();

}  // namespace qwen2vl::bench
