#pragma once

#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/runtime.h"
#include "model/profile.h"

namespace qwen2vl::cuda {

/// The stages of a forward pass, timed with the stream's events: nothing waits until they are asked for.
class StageTimer {
 public:
  class Stage {
   public:
    Stage(StageTimer* timer, cudaStream_t stream, std::string_view name, const Work& work);
    ~Stage();
    Stage(const Stage&) = delete;
    Stage& operator=(const Stage&) = delete;

   private:
    StageTimer* timer_;
    cudaStream_t stream_;
    size_t entry_ = 0;
  };

  ~StageTimer() { clear(); }
  bool on() const { return on_; }
  void start();
  std::vector<StageRecord> stop();

 private:
  struct Entry {
    std::string name;
    Work work;
    cudaEvent_t begin, end;
  };
  void clear();

  bool on_ = false;
  std::deque<Entry> entries_;
};

/// Adds a stage's times to the others of its name.
void add_record(std::vector<StageRecord>& records, StageRecord record);

/// Compute capability that the kernels need: major.0.
inline constexpr int kLeastMajor = 8;

/// One device: its stream, the memory that weights may take, and what kernels of all parts share.
class Context {
 public:
  /// memory_bytes: of the device for weights; 0: what is free, less what a conversation needs.
  Context(int device, int64_t memory_bytes);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  /// Memory for weights, for the life of the context: the device's, or the host's where that has no room
  /// left.
  uint8_t* allocate_weights(int64_t bytes);
  /// For weights.
  int64_t room() const { return budget_; }
  int64_t weight_bytes() const { return weight_bytes_; }
  int64_t host_weight_bytes() const { return host_weight_bytes_; }

  [[nodiscard]] StageTimer::Stage stage(std::string_view name, const Work& work = {}) {
    return {timer.on() ? &timer : nullptr, stream, name, work};
  }
  /// Blocks of a kernel that are at work at once.
  int resident_blocks(const void* kernel, int threads, int64_t shared_bytes) const;

  void copy_to_device(void* to, const void* from, int64_t bytes);
  void copy_to_host(void* to, const void* from, int64_t bytes);  ///< waits for it
  void synchronize();

  int device = 0;
  cudaDeviceProp properties{};
  bool has_wgmma = false;
  cudaStream_t stream = nullptr;
  StageTimer timer;
  DeviceBuffer dequantized;  ///< a plain product's weights as float32

 private:
  int64_t budget_ = 0;
  int64_t weight_bytes_ = 0, host_weight_bytes_ = 0;
  std::vector<DeviceBuffer> weights_;
  std::vector<PinnedBuffer> host_weights_;
};

}  // namespace qwen2vl::cuda
