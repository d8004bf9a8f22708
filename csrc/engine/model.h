#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <string>

#include "base/call_lock.h"
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
ModelFiles open_model(const std::filesystem::path& path, const std::filesystem::path& mmproj);

struct ModelOptions {
  std::filesystem::path mmproj;  ///< the vision tower's file where it is not in the model's own; empty: none
  BackendOptions backend;
};

/// A loaded model. Threads may share it: calls of the backend go one at a time. Error where one could never
/// begin (CallLock): made by another's progress callback, or in a process that was forked during one.
class Model {
 public:
  Model(const std::filesystem::path& path, const ModelOptions& options, const Progress& progress);

  const ModelConfig& config() const { return config_; }
  Precision precision() const { return precision_; }

  /// Exclusive use of the backend for as long as the lock lives.
  struct Locked {
    std::unique_lock<CallLock> lock;
    Backend& backend;
  };
  Locked lock() { return {std::unique_lock(call_lock_), *chosen_.backend}; }
  const Backend& backend() const { return *chosen_.backend; }
  /// A warning to the user about where the model computes, or empty.
  std::string note() const { return chosen_.note.empty() ? backend().note() : chosen_.note; }

 private:
  ModelConfig config_;
  Precision precision_;
  ChosenBackend chosen_;
  CallLock call_lock_;
};

}  // namespace qwen2vl
