#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace qwen2vl {

/// What a stage has to do at least: operations (a multiply and an add are two) of matrix products with 8-bit
/// and with floating-point operands, and bytes of memory that cannot be in a cache.
struct Work {
  double int8_ops = 0;
  double float_ops = 0;
  double bytes = 0;
};

struct StageRecord {
  std::string name;
  int64_t calls = 0;
  double seconds = 0;
  Work work;
};

/// Times the stages of the forward passes while it is on. One thread at a time.
class Profile {
 public:
  /// Counts from its construction to its end.
  class Stage {
   public:
    Stage(Profile* profile, std::string_view name, const Work& work)
        : profile_(profile), name_(name), work_(work) {
      if (profile_ != nullptr) start_ = std::chrono::steady_clock::now();
    }
    ~Stage() {
      if (profile_ != nullptr) profile_->add(name_, work_, std::chrono::steady_clock::now() - start_);
    }
    Stage(const Stage&) = delete;
    Stage& operator=(const Stage&) = delete;

   private:
    Profile* profile_;
    std::string_view name_;
    Work work_;
    std::chrono::steady_clock::time_point start_;
  };

  [[nodiscard]] Stage stage(std::string_view name, const Work& work = {}) {
    return {on_ ? this : nullptr, name, work};
  }

  void start() {
    on_ = true;
    records_.clear();
  }
  /// The stages in the order of their first call; switches the profile off.
  std::vector<StageRecord> stop() {
    on_ = false;
    return std::move(records_);
  }

 private:
  void add(std::string_view name, const Work& work, std::chrono::duration<double> time) {
    StageRecord* record = nullptr;
    for (StageRecord& r : records_)
      if (r.name == name) record = &r;
    if (record == nullptr) record = &records_.emplace_back(StageRecord{std::string(name), 0, 0, {}});
    ++record->calls;
    record->seconds += time.count();
    record->work.int8_ops += work.int8_ops;
    record->work.float_ops += work.float_ops;
    record->work.bytes += work.bytes;
  }

  bool on_ = false;
  std::vector<StageRecord> records_;
};

}  // namespace qwen2vl
