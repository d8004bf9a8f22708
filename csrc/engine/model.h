#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "engine/backend_registry.h"
#include "model/backend.h"
#include "model/config.h"
#include "model/weights.h"

namespace qwen2vl {

/// A model's file, or two of them, with all checks made that are not a backend's.
struct ModelFiles {
  ModelConfig config;
  Weights weights;  ///< views: of the data, norms and biases alone have been read
};

/// `mmproj`: the vision tower's file where it is not in the model's own; empty: none.
ModelFiles open_model(const std::string& path, const std::string& mmproj);

struct ModelOptions {
  std::string mmproj;  ///< the vision tower's file where it is not in the model's own; empty: none
  BackendOptions backend;
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
  Locked lock() { return {std::unique_lock(mutex_), *chosen_.backend}; }
  const Backend& backend() const { return *chosen_.backend; }
  /// A warning to the user about where the model computes, or empty.
  std::string note() const { return chosen_.note.empty() ? backend().note() : chosen_.note; }

 private:
  ModelConfig config_;
  Precision precision_;
  ChosenBackend chosen_;
  std::mutex mutex_;
};

}  // namespace qwen2vl
