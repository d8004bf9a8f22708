#include "cuda/runtime.h"

namespace qwen2vl::cuda {
namespace {

std::string megabytes(size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // a failed call must not be reported by the next one
  throw DeviceError(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

void DeviceBuffer::resize(int64_t bytes) {
  if (bytes <= bytes_) return;
  release();
  const cudaError_t status = cudaMalloc(&data_, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    size_t free = 0, total = 0;
    (void)cudaMemGetInfo(&free, &total);
    data_ = nullptr;
    throw DeviceMemoryError("the device has too little memory: " + megabytes(static_cast<size_t>(bytes)) +
                            " more are needed, " + megabytes(free) + " of " + megabytes(total) + " are free");
  }
  check(status, "cudaMalloc of " + megabytes(static_cast<size_t>(bytes)));
  bytes_ = bytes;
}

void DeviceBuffer::release() {
  if (data_ != nullptr) (void)cudaFree(data_);
  data_ = nullptr;
  bytes_ = 0;
}

PinnedBuffer::PinnedBuffer(int64_t bytes) {
  check(cudaMallocHost(&host_, static_cast<size_t>(bytes)),
        "page-locked host memory, " + megabytes(static_cast<size_t>(bytes)));
  bytes_ = bytes;
}

PinnedBuffer::~PinnedBuffer() {
  if (host_ != nullptr) (void)cudaFreeHost(host_);
}

}  // namespace qwen2vl::cuda
