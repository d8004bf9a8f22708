#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "cuda/chip.h"

#ifdef QWEN2VL_STAND_IN
#include "stand_in/runtime.h"  // cuda_runtime.h's calls that are used here, on the host's memory
#endif

namespace qwen2vl::cuda {

/// Too little memory: what can be put elsewhere may be.
class DeviceMemoryError : public DeviceError {
 public:
  using DeviceError::DeviceError;
};

/// DeviceError with CUDA's own words where `status` is an error. `what`: the call, or kernel and size.
void check(cudaError_t status, const std::string& what);

/// Memory of the current device, given back with the object. Contents are undefined unless `zero` is called.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(int64_t bytes) { resize(bytes); }
  ~DeviceBuffer() { release(); }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  /// At least `bytes`; what was in it is lost where it grows. DeviceError, saying how much was asked for and
  /// how much is free, where the device has too little.
  void resize(int64_t bytes);
  void release();
  void swap(DeviceBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  int64_t bytes() const { return bytes_; }
  template <typename T = uint8_t>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// Host memory that the device reads and writes: results, and weights that have no room on it.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(int64_t bytes);
  ~PinnedBuffer();
  PinnedBuffer(PinnedBuffer&& other) noexcept { swap(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  void swap(PinnedBuffer& other) noexcept {
    std::swap(host_, other.host_);
    std::swap(bytes_, other.bytes_);
  }

  int64_t bytes() const { return bytes_; }
  template <typename T = uint8_t>
  T* as() const {
    return static_cast<T*>(host_);
  }

 private:
  void* host_ = nullptr;
  int64_t bytes_ = 0;
};

/// How a kernel is spread over the chip.
struct Launch {
  const char* name;  ///< for errors
  dim3 grid;
  int threads;
  int64_t shared_bytes = 0;
  bool overlaps = false;  ///< waits for the launch before by itself (wait_for_previous_launch)
  int cluster = 1;        ///< cluster x cluster blocks that share their shared memory (Hopper on)
};

/// Puts a kernel on a stream. DeviceError with its name and size where that fails.
template <typename... Parameters, typename... Arguments>
void launch(cudaStream_t stream, const Launch& how, void (*kernel)(Parameters...), Arguments&&... arguments) {
#ifdef QWEN2VL_STAND_IN
  // By value: a graph runs it later.
  stand_in::launch(stream, how.name, how.grid, how.threads, how.shared_bytes,
                   [kernel, values = std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)] {
                     std::apply(kernel, values);
                   });
#else
  if (how.shared_bytes > 48 * 1024)
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes)),
        std::string(how.name) + ": " + std::to_string(how.shared_bytes) + " bytes of shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (how.overlaps) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = attribute.val.clusterDim.y = static_cast<unsigned>(how.cluster);
    attribute.val.clusterDim.z = 1;
  }
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status != cudaSuccess)
    check(status, std::string(how.name) + ", " + std::to_string(how.grid.x) + " x " +
                      std::to_string(how.grid.y) + " x " + std::to_string(how.grid.z) + " blocks of " +
                      std::to_string(how.threads) + " threads");
#endif
}

}  // namespace qwen2vl::cuda
