#include "cpu/scratch.h"

namespace qwen2vl::cpu {
namespace {

// The parts of a buffer begin with a cache line each.
int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

QuantizedRows Scratch::quantized_rows(int64_t rows, int64_t cols, int planes) {
  const int64_t values = round64(planes * rows * cols);
  const int64_t per_block = round64(planes * rows * (cols / kBlock32) * 4);
  uint8_t* p = grow(quantized, values + 4 * per_block);
  QuantizedRows q;
  q.rows = rows;
  q.cols = cols;
  q.planes = planes;
  q.values = reinterpret_cast<int8_t*>(p);
  q.scales = reinterpret_cast<float*>(p + values);
  q.corrections32 = reinterpret_cast<int32_t*>(p + values + per_block);
  q.corrections16 = reinterpret_cast<int32_t*>(p + values + 2 * per_block);
  return q;
}

GroupedRows Scratch::grouped_rows(GroupRule rule, int64_t rows, int64_t cols) {
  GroupedRows x;
  x.rule = rule;
  x.rows = rows;
  x.cols = cols;
  const int64_t n = x.groups() * rows, values = n * kGroupColumns, per_group = round64(n * 4);
  const int64_t sums = rule == GroupRule::Scales ? n * kGroupSums * 2 : per_group;
  uint8_t* p = grow(quantized, values + per_group + sums);
  x.values = reinterpret_cast<int8_t*>(p);
  x.scales = reinterpret_cast<float*>(p + values);
  if (rule == GroupRule::Scales)
    x.sums = reinterpret_cast<int16_t*>(p + values + per_group);
  else
    x.corrections = reinterpret_cast<int32_t*>(p + values + per_group);
  return x;
}

void Scratch::reserve_kernel(size_t bytes) {
  for (ThreadScratch& thread : threads) grow(thread.kernel, bytes);
}

}  // namespace qwen2vl::cpu
