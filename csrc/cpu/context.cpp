#include "cpu/context.h"

namespace qwen2vl::cpu {

Context::Context(const KernelTable& kernel_table, int n_threads, Precision precision_)
    : kernels(kernel_table),
      pool(n_threads),
      precision(precision_),
      scratch_(pool.size()),
      rows_(pool.size()) {}

void Context::reserve_scratch(size_t bytes) {
  for (AlignedBuffer& buffer : scratch_)
    if (buffer.size() < bytes) {
      buffer = AlignedBuffer();
      buffer = AlignedBuffer(bytes);
    }
}

QuantizedRows Context::quantized(int64_t rows, int64_t cols) {
  const auto round64 = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t values = round64(rows * cols);
  const int64_t per_block = round64(rows * (cols / kBlock32) * 4);
  const int64_t total = values + 4 * per_block;
  if (quantized_.size() < static_cast<size_t>(total)) {
    quantized_ = AlignedBuffer();
    quantized_ = AlignedBuffer(total);
  }
  uint8_t* p = quantized_.data();
  QuantizedRows q;
  q.rows = rows;
  q.cols = cols;
  q.values = reinterpret_cast<int8_t*>(p);
  q.scales = reinterpret_cast<float*>(p + values);
  q.corrections32 = reinterpret_cast<int32_t*>(p + values + per_block);
  q.corrections16 = reinterpret_cast<int32_t*>(p + values + 2 * per_block);
  return q;
}

}  // namespace qwen2vl::cpu
