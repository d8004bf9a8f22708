#include "cpu/context.h"

namespace qwen2vl::cpu {
namespace {

int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

Context::Context(const KernelTable& kernel_table, int n_threads, Precision precision_)
    : kernels(kernel_table),
      pool(n_threads),
      precision(precision_),
      scratch_(pool.size()),
      outliers_(pool.size()),
      rows_(pool.size()) {}

void Context::reserve_scratch(size_t bytes) {
  for (AlignedBuffer& buffer : scratch_)
    if (buffer.size() < bytes) {
      buffer = AlignedBuffer();
      buffer = AlignedBuffer(bytes);
    }
}

uint8_t* Context::quantized_bytes(int64_t bytes) {
  if (quantized_.size() < static_cast<size_t>(bytes)) {
    quantized_ = AlignedBuffer();
    quantized_ = AlignedBuffer(bytes);
  }
  return quantized_.data();
}

QuantizedRows Context::quantized(int64_t rows, int64_t cols, int planes) {
  const int64_t values = round64(planes * rows * cols);
  const int64_t per_block = round64(planes * rows * (cols / kBlock32) * 4);
  uint8_t* p = quantized_bytes(values + 4 * per_block);
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

GroupedRows Context::grouped(int64_t rows, int64_t cols) {
  GroupedRows x;
  x.rows = rows;
  x.cols = cols;
  const int64_t values = x.groups() * rows * kGroupColumns, per_group = round64(x.groups() * rows * 4);
  uint8_t* p = quantized_bytes(values + 2 * per_group);
  x.values = reinterpret_cast<int8_t*>(p);
  x.scales = reinterpret_cast<float*>(p + values);
  x.corrections = reinterpret_cast<int32_t*>(p + values + per_group);
  return x;
}

}  // namespace qwen2vl::cpu
