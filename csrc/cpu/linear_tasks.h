#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "cpu/packed_linear.h"

namespace qwen2vl::cpu {

// Rows that one task multiplies with its panels: 512 rows of 1280 int8 activations are 640 KiB, most of a
// second-level cache of 1 MiB, and each panel that is loaded is used 512 times.
inline constexpr int64_t kRowsPerTask = kMaxGroupedRows;
// Panels per task: an even number, since kernels take two at a time.
inline constexpr int64_t kPanelsPerTask = 4;
// Tasks of up to kMemoryBoundRows read about so many bytes, four microseconds of a core, so that no thread
// waits long for the last one; and at most so many panels, whose sums of 16 rows in 16 bits (32 KiB) stay in
// the first-level cache.
inline constexpr int64_t kBytesPerTask = 96 << 10;
inline constexpr int64_t kMostPanelsPerTask = 16;

/// fn(part, task, thread) for all of a layer's panels: row block by row block, and within one all panels, so
/// that the activations stay in cache.
template <typename Fn>
void for_tasks(Context& ctx, std::span<const PackedLinear::Part> parts, int64_t rows, const Fn& fn) {
  const int64_t panels =
      rows > kMemoryBoundRows
          ? kPanelsPerTask
          : std::clamp<int64_t>(kBytesPerTask / parts[0].matrix.panel_bytes, 1, kMostPanelsPerTask);
  const auto tasks_of = [&](const PackedLinear::Part& part) {
    return (part.matrix.panel_count() + panels - 1) / panels;
  };
  int64_t per_block = 0;
  for (const PackedLinear::Part& part : parts) per_block += tasks_of(part);
  const int64_t blocks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  ctx.pool.parallel_for(blocks * per_block, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t t = begin; t < end; ++t) {
      const PackedLinear::Part* part = parts.data();
      int64_t in_part = t % per_block;
      for (; in_part >= tasks_of(*part); ++part) in_part -= tasks_of(*part);
      const int64_t row = t / per_block * kRowsPerTask, panel = in_part * panels;
      fn(*part,
         MatmulTask{panel, std::min(panel + panels, part->matrix.panel_count()), row,
                    std::min(row + kRowsPerTask, rows)},
         thread);
    }
  });
}

}  // namespace qwen2vl::cpu
