#include <algorithm>

#include "cuda/context.h"

namespace qwen2vl::cuda {
namespace {

// Left to buffers, the cache of a conversation and the vision tower's activations when weights are placed.
constexpr int64_t kReserve = int64_t{1} << 30;
constexpr int64_t kAlignment = 256;  // cudaMalloc's own

}  // namespace

void add_record(std::vector<StageRecord>& records, StageRecord record) {
  const auto found = std::find_if(records.begin(), records.end(),
                                  [&](const StageRecord& other) { return other.name == record.name; });
  if (found == records.end()) {
    records.push_back(std::move(record));
    return;
  }
  found->calls += record.calls;
  found->seconds += record.seconds;
  found->work.int8_ops += record.work.int8_ops;
  found->work.float_ops += record.work.float_ops;
  found->work.bytes += record.work.bytes;
}

StageTimer::Stage::Stage(StageTimer* timer, cudaStream_t stream, std::string_view name, const Work& work)
    : timer_(timer), stream_(stream) {
  if (timer_ == nullptr) return;
  entry_ = timer_->entries_.size();
  Entry& entry = timer_->entries_.emplace_back(Entry{std::string(name), work, nullptr, nullptr});
  check(cudaEventCreate(&entry.begin), "cudaEventCreate");
  check(cudaEventCreate(&entry.end), "cudaEventCreate");
  check(cudaEventRecord(entry.begin, stream_), "cudaEventRecord");
}

StageTimer::Stage::~Stage() {
  if (timer_ != nullptr) (void)cudaEventRecord(timer_->entries_[entry_].end, stream_);
}

void StageTimer::start() {
  clear();
  on_ = true;
}

std::vector<StageRecord> StageTimer::stop() {
  std::vector<StageRecord> records;
  for (const Entry& entry : entries_) {
    check(cudaEventSynchronize(entry.end), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, entry.begin, entry.end), "cudaEventElapsedTime");
    add_record(records, {entry.name, 1, static_cast<double>(milliseconds) * 1e-3, entry.work});
  }
  clear();
  return records;
}

void StageTimer::clear() {
  on_ = false;
  for (const Entry& entry : entries_)
    for (cudaEvent_t event : {entry.begin, entry.end})
      if (event != nullptr) (void)cudaEventDestroy(event);
  entries_.clear();
}

Context::Context(int device_index, int64_t memory_bytes) : device(device_index) {
  check(cudaSetDevice(device), "device " + std::to_string(device));
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  has_wgmma = properties.major == 9;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const int64_t available = std::max<int64_t>(static_cast<int64_t>(free) - kReserve, 0);
  budget_ = memory_bytes > 0 ? std::min(memory_bytes, available) : available;
}

Context::~Context() {
  (void)cudaSetDevice(device);
  (void)cudaStreamSynchronize(stream);
  (void)cudaStreamDestroy(stream);
}

uint8_t* Context::allocate_weights(int64_t bytes) {
  const int64_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  weight_bytes_ += size;
  if (size <= budget_) try {
      DeviceBuffer buffer(size);
      budget_ -= size;
      return weights_.emplace_back(std::move(buffer)).as();
    } catch (const DeviceMemoryError&) {
      budget_ = 0;  // the rest goes to the host, too
    }
  host_weight_bytes_ += size;
  return host_weights_.emplace_back(PinnedBuffer(size)).as();
}

int Context::resident_blocks(const void* kernel, int threads, int64_t shared_bytes) const {
  int blocks = 1;
#ifdef QWEN2VL_STAND_IN
  (void)kernel, (void)threads, (void)shared_bytes;
#else
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads,
                                                      static_cast<size_t>(shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
#endif
  return std::max(blocks, 1) * properties.multiProcessorCount;
}

void Context::copy_to_device(void* to, const void* from, int64_t bytes) {
  if (bytes > 0)
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream),
          "copying " + std::to_string(bytes) + " bytes to the device");
}

void Context::copy_to_host(void* to, const void* from, int64_t bytes) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream),
        "copying " + std::to_string(bytes) + " bytes from the device");
  synchronize();
}

void Context::synchronize() { check(cudaStreamSynchronize(stream), "waiting for the device"); }

}  // namespace qwen2vl::cuda
