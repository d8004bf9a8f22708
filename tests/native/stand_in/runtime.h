#pragma once

// The calls of CUDA's runtime that csrc/cuda makes, on the host's memory: device memory comes from the
// allocator, so that an address sanitizer sees what runs over it, and is poisoned. Everything has happened
// when a call returns, or is deferred until the host waits (stand_in::set_deferred); while a stream is
// captured, launches and asynchronous copies are kept for its graph instead.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "stand_in/chip.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorUnknown = 999
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
  int major, minor, multiProcessorCount, l2CacheSize, warpSize, maxThreadsPerBlock, integrated;
};

inline constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0,
                          cudaEventBlockingSync = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0,
                          cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4,
                          cudaEventWaitDefault = 0, cudaEventRecordDefault = 0;

struct CUstream_st {
  int device = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::vector<std::function<void()>> work;
};
struct CUevent_st {
  bool timed = true, recorded = false;
  int64_t after = 0;  // so many pieces of work
  std::chrono::steady_clock::time_point time;
};
struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;

namespace qwen2vl::cuda::stand_in {

/// What cudaMalloc and cudaMallocHost have given, and how much a device has.
struct Memory {
  std::mutex mutex;
  struct Block {
    size_t bytes = 0;
    int device = 0;
  };
  std::map<void*, Block> device;
  std::map<void*, size_t> pinned;
  std::map<int, size_t> used;  // by device
  size_t limit = size_t{16} << 30;
  int reachable = kAll;  // the device whose memory the running kernel reaches
  static constexpr int kAll = -1;
};
inline Memory& memory() {
  static Memory memory;
  return memory;
}

/// A host thread's device, last error and the stream that it captures.
struct Calls {
  int device = 0;
  cudaError_t last_error = cudaSuccess;
  cudaStream_t capturing = nullptr;
};
inline thread_local Calls calls;

/// Bytes that a device has; beyond, cudaMalloc fails.
inline void set_memory(int64_t bytes) {
  const std::lock_guard lock(memory().mutex);
  memory().limit = static_cast<size_t>(bytes);
}
/// Bytes that cudaMalloc has given and cudaFree not taken back.
inline int64_t memory_in_use() {
  const std::lock_guard lock(memory().mutex);
  size_t bytes = 0;
  for (const auto& [device, used] : memory().used) bytes += used;
  return static_cast<int64_t>(bytes);
}
/// The same of cudaMallocHost and cudaHostAlloc.
inline int64_t pinned_in_use() {
  const std::lock_guard lock(memory().mutex);
  int64_t bytes = 0;
  for (const auto& [address, size] : memory().pinned) bytes += static_cast<int64_t>(size);
  return bytes;
}

/// QWEN2VL_STAND_IN_DEVICES of the environment, otherwise one.
inline int device_count() {
  const char* devices = std::getenv("QWEN2VL_STAND_IN_DEVICES");
  return devices == nullptr ? 1 : std::atoi(devices);
}

inline cudaError_t result(cudaError_t status) {
  if (status != cudaSuccess) calls.last_error = status;
  return status;
}

/// What waits for the device or allocates must not be called while a stream is captured: the capture fails
/// then.
inline bool spoils_capture() {
  const cudaStream_t stream = calls.capturing;
  if (stream == nullptr || stream->mode == cudaStreamCaptureModeRelaxed) return false;
  stream->status = cudaStreamCaptureStatusInvalidated;
  return true;
}

inline constexpr size_t kMemoryAlignment = 256;

/// Poisoned, and not rounded up: what is beyond belongs to nobody.
inline void* allocate(size_t bytes) {
  void* address = nullptr;
  if (posix_memalign(&address, kMemoryAlignment, std::max<size_t>(bytes, 1)) != 0) return nullptr;
  std::memset(address, 0xcd, bytes);
  return address;
}

/// Where there are several devices, memory is of whole pages of the system's, so that it can be out of reach:
/// a kernel that touches another device's dies of it.
inline size_t whole_pages(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (std::max<size_t>(bytes, 1) + page - 1) / page * page;
}
inline void* allocate_device(size_t bytes) {
  if (device_count() == 1) return allocate(bytes);
  void* address =
      mmap(nullptr, whole_pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return nullptr;
  std::memset(address, 0xcd, bytes);
  return address;
}
inline void free_device(void* address, size_t bytes) {
  if (device_count() == 1)
    std::free(address);
  else
    munmap(address, whole_pages(bytes));
}

/// From here on kernels reach the memory of `device` alone, or everyone's.
inline void reach(int device) {
  if (device_count() == 1) return;
  const std::lock_guard lock(memory().mutex);
  if (memory().reachable == device) return;
  memory().reachable = device;
  for (const auto& [address, block] : memory().device) {
    const bool reached = device == Memory::kAll || block.device == device;
    mprotect(address, whole_pages(block.bytes), reached ? PROT_READ | PROT_WRITE : PROT_NONE);
  }
}

/// A kernel's launch: on the stream's device, which has to be the calling thread's.
template <typename Body>
void launch(cudaStream_t stream, const char* name, dim3 grid, int threads, int64_t shared_bytes, Body body) {
  const int device = stream == nullptr ? calls.device : stream->device;
  if (device != calls.device)
    throw std::logic_error(std::string(name) + ": a stream of device " + std::to_string(device) +
                           " while the thread's is " + std::to_string(calls.device));
  submit([=]() mutable {
    reach(device);
    run_now(name, grid, threads, shared_bytes, [](void* b) { (*static_cast<Body*>(b))(); }, &body);
    reach(Memory::kAll);
  });
}

inline cudaError_t asynchronously(std::function<void()> work) {
  submit(std::move(work));
  return cudaSuccess;
}

/// Waits for the first `count` pieces of work.
inline cudaError_t wait_for(int64_t count) {
  if (spoils_capture()) return result(cudaErrorStreamCaptureUnsupported);
  finish(count);
  return cudaSuccess;
}

}  // namespace qwen2vl::cuda::stand_in

// --- errors ------------------------------------------------------------------------------------------------

inline const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInitializationError:
      return "cudaErrorInitializationError";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorUnknown:
      break;
  }
  return "cudaErrorUnknown";
}
inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return cudaGetErrorName(status);
  }
}
inline cudaError_t cudaPeekAtLastError() { return qwen2vl::cuda::stand_in::calls.last_error; }
inline cudaError_t cudaGetLastError() {
  return std::exchange(qwen2vl::cuda::stand_in::calls.last_error, cudaSuccess);
}

// --- devices -----------------------------------------------------------------------------------------------

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = qwen2vl::cuda::stand_in::device_count();
  return qwen2vl::cuda::stand_in::result(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}
inline cudaError_t cudaSetDevice(int device) {
  namespace s = qwen2vl::cuda::stand_in;
  if (device < 0 || device >= s::device_count()) return s::result(cudaErrorInvalidDevice);
  s::calls.device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = qwen2vl::cuda::stand_in::calls.device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  namespace s = qwen2vl::cuda::stand_in;
  if (device < 0 || device >= s::device_count()) return s::result(cudaErrorInvalidDevice);
  *properties = {};
  std::memcpy(properties->name, "stand-in", 9);
  properties->totalGlobalMem = s::memory().limit;
  properties->sharedMemPerBlock = 48 * 1024;
  properties->sharedMemPerBlockOptin = static_cast<size_t>(s::kSharedBytes);
  properties->sharedMemPerMultiprocessor = static_cast<size_t>(s::kSharedBytes) + 1024;
  properties->major = 8;
  properties->minor = 0;
  properties->multiProcessorCount = 4;
  properties->l2CacheSize = 4 << 20;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  if (const cudaError_t status = cudaGetDeviceProperties(&properties, device)) return status;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      break;
    case cudaDevAttrL2CacheSize:
      *value = properties.l2CacheSize;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(properties.sharedMemPerMultiprocessor);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(properties.sharedMemPerBlockOptin);
      break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
inline cudaError_t cudaDeviceSynchronize() {
  return qwen2vl::cuda::stand_in::wait_for(qwen2vl::cuda::stand_in::submitted());
}

// --- memory ------------------------------------------------------------------------------------------------

inline cudaError_t cudaMalloc(void** address, size_t bytes) {
  namespace s = qwen2vl::cuda::stand_in;
  if (s::spoils_capture()) return s::result(cudaErrorStreamCaptureUnsupported);
  const std::lock_guard lock(s::memory().mutex);
  *address = nullptr;
  if (bytes == 0) return cudaSuccess;
  size_t& used = s::memory().used[s::calls.device];
  if (used > s::memory().limit || bytes > s::memory().limit - used)
    return s::result(cudaErrorMemoryAllocation);
  *address = s::allocate_device(bytes);
  if (*address == nullptr) return s::result(cudaErrorMemoryAllocation);
  s::memory().device[*address] = {bytes, s::calls.device};
  used += bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* address) {
  namespace s = qwen2vl::cuda::stand_in;
  if (address == nullptr) return cudaSuccess;
  if (const cudaError_t status = cudaDeviceSynchronize()) return status;
  const std::lock_guard lock(s::memory().mutex);
  const auto found = s::memory().device.find(address);
  if (found == s::memory().device.end()) return s::result(cudaErrorInvalidValue);
  const s::Memory::Block block = found->second;
  s::memory().used[block.device] -= block.bytes;
  s::memory().device.erase(found);
  s::free_device(address, block.bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  auto& memory = qwen2vl::cuda::stand_in::memory();
  const std::lock_guard lock(memory.mutex);
  *total = memory.limit;
  *free = memory.limit - std::min(memory.used[qwen2vl::cuda::stand_in::calls.device], memory.limit);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned /*flags*/) {
  namespace s = qwen2vl::cuda::stand_in;
  if (s::spoils_capture()) return s::result(cudaErrorStreamCaptureUnsupported);
  const std::lock_guard lock(s::memory().mutex);
  *address = bytes == 0 ? nullptr : s::allocate(bytes);
  if (bytes == 0) return cudaSuccess;
  if (*address == nullptr) return s::result(cudaErrorMemoryAllocation);
  s::memory().pinned[*address] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** address, size_t bytes) {
  return cudaHostAlloc(address, bytes, cudaHostAllocDefault);
}
inline cudaError_t cudaFreeHost(void* address) {
  namespace s = qwen2vl::cuda::stand_in;
  if (address == nullptr) return cudaSuccess;
  if (const cudaError_t status = cudaDeviceSynchronize()) return status;
  const std::lock_guard lock(s::memory().mutex);
  if (s::memory().pinned.erase(address) == 0) return s::result(cudaErrorInvalidValue);
  std::free(address);
  return cudaSuccess;
}
inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned /*flags*/) {
  *device = host;
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaMalloc(T** address, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(address), bytes);
}
template <typename T>
cudaError_t cudaMallocHost(T** address, size_t bytes) {
  return cudaMallocHost(reinterpret_cast<void**>(address), bytes);
}
template <typename T>
cudaError_t cudaHostAlloc(T** address, size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(address), bytes, flags);
}
template <typename T>
cudaError_t cudaHostGetDevicePointer(T** device, void* host, unsigned flags) {
  return cudaHostGetDevicePointer(reinterpret_cast<void**>(device), host, flags);
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind /*kind*/) {
  namespace s = qwen2vl::cuda::stand_in;
  if (s::spoils_capture()) return s::result(cudaErrorStreamCaptureUnsupported);
  if (bytes != 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind /*kind*/,
                                   cudaStream_t = nullptr) {
  return qwen2vl::cuda::stand_in::asynchronously([=] {
    if (bytes != 0) std::memmove(to, from, bytes);
  });
}
inline cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device,
                                       size_t bytes, cudaStream_t = nullptr) {
  namespace s = qwen2vl::cuda::stand_in;
  const auto is_of = [](const void* address, int device) {
    const std::lock_guard lock(s::memory().mutex);
    auto found = s::memory().device.upper_bound(const_cast<void*>(address));
    return found != s::memory().device.begin() && (--found)->second.device == device;
  };
  if (!is_of(to, to_device) || !is_of(from, from_device)) return s::result(cudaErrorInvalidValue);
  return s::asynchronously([=] { std::memmove(to, from, bytes); });
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                     size_t width, size_t height, cudaMemcpyKind /*kind*/,
                                     cudaStream_t = nullptr) {
  namespace s = qwen2vl::cuda::stand_in;
  if (width > to_pitch || width > from_pitch) return s::result(cudaErrorInvalidValue);
  return s::asynchronously([=] {
    for (size_t row = 0; row < height && width != 0; ++row)
      std::memmove(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
                   width);
  });
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  namespace s = qwen2vl::cuda::stand_in;
  if (s::spoils_capture()) return s::result(cudaErrorStreamCaptureUnsupported);
  if (bytes != 0) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  return qwen2vl::cuda::stand_in::asynchronously([=] {
    if (bytes != 0) std::memset(to, value, bytes);
  });
}

// --- streams and events ------------------------------------------------------------------------------------

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/) {
  *stream = new CUstream_st;
  (*stream)->device = qwen2vl::cuda::stand_in::calls.device;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  namespace s = qwen2vl::cuda::stand_in;
  if (stream == nullptr) return s::result(cudaErrorInvalidResourceHandle);
  if (s::calls.capturing == stream) {
    s::record_into(nullptr);
    s::calls.capturing = nullptr;
  }
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t /*stream*/) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaStreamQuery(cudaStream_t /*stream*/) { return cudaDeviceSynchronize(); }

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = new CUevent_st;
  (*event)->timed = (flags & cudaEventDisableTiming) == 0;
  return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event == nullptr) return qwen2vl::cuda::stand_in::result(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t = nullptr) {
  event->recorded = true;
  event->after = qwen2vl::cuda::stand_in::submitted();
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return qwen2vl::cuda::stand_in::wait_for(event->after);
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  if (!from->timed || !to->timed || !from->recorded || !to->recorded)
    return qwen2vl::cuda::stand_in::result(cudaErrorInvalidResourceHandle);
  *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t /*stream*/, cudaEvent_t /*event*/, unsigned = 0) {
  return cudaSuccess;
}

// --- graphs ------------------------------------------------------------------------------------------------

/// One capture at a time: what this host thread does on any stream goes into it, in the order of the calls.
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  namespace s = qwen2vl::cuda::stand_in;
  if (stream == nullptr) return s::result(cudaErrorStreamCaptureUnsupported);
  if (s::calls.capturing != nullptr) return s::result(cudaErrorInvalidValue);
  stream->status = cudaStreamCaptureStatusActive;
  stream->mode = mode;
  stream->work.clear();
  s::calls.capturing = stream;
  s::record_into(&stream->work);
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  namespace s = qwen2vl::cuda::stand_in;
  *graph = nullptr;
  if (stream == nullptr || s::calls.capturing != stream) return s::result(cudaErrorInvalidValue);
  s::record_into(nullptr);
  s::calls.capturing = nullptr;
  const bool whole = stream->status == cudaStreamCaptureStatusActive;
  stream->status = cudaStreamCaptureStatusNone;
  if (whole) *graph = new CUgraph_st{std::move(stream->work)};
  stream->work.clear();
  return s::result(whole ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream == nullptr ? cudaStreamCaptureStatusNone : stream->status;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                        unsigned long long = 0) {
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t /*stream*/) {
  for (const auto& work : executable->work) qwen2vl::cuda::stand_in::asynchronously(work);
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
