#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "gguf/reader.h"
#include "model/backend.h"
#include "model/weights.h"

namespace qwen2vl {

struct ModelOptions {
  std::string mmproj;  ///< the vision tower's file where it is not in the model's own; empty: none
  int n_threads = 0;   ///< 0: default_thread_count()
  Precision precision = Precision::Fast;
  std::string isa;  ///< empty: the best one
};

/// A loaded model. Threads may share it: calls of the backend go one at a time.
class Model {
 public:
  Model(const std::string& path, const ModelOptions& options, const Progress& progress);

  const ModelConfig& config() const { return config_; }
  Precision precision() const { return precision_; }

  /// Exclusive use of the backend for as long as the lock lives.
  struct Locked {
    std::unique_lock<std::mutex> lock;
    Backend& backend;
  };
  Locked lock() { return {std::unique_lock(mutex_), *backend_}; }
  const Backend& backend() const { return *backend_; }

 private:
  ModelConfig config_;
  Precision precision_;
  std::unique_ptr<Backend> backend_;
  std::mutex mutex_;
};

}  // namespace qwen2vl
