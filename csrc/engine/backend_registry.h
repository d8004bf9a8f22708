#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "model/backend.h"
#include "model/weights.h"

namespace qwen2vl {

struct BackendOptions {
  std::string device =
      "cpu";  ///< "cpu", "cuda" (its first), "cuda:1", "auto" (cuda where it works, else cpu)
  Precision precision = Precision::Fast;
  int n_threads = 0;             ///< of the CPU; 0: default_thread_count()
  std::string isa;               ///< of the CPU; empty: the best one
  std::filesystem::path plugin;  ///< the library of the cuda backend; empty: none is installed
  int64_t device_memory = 0;     ///< bytes of a device's memory that may be used; 0: what is free
};

struct ChosenBackend {
  std::unique_ptr<Backend> backend;
  std::string note;  ///< why "auto" has not taken a device whose plug-in is there; else empty
};

/// Throws std::invalid_argument where `device` is no name of a backend.
void require_device_name(const std::string& device);

/// The one place that knows every backend. DeviceError, saying why, where one that was asked for is not there
/// or does not take the model.
ChosenBackend make_backend(const ModelConfig& config, Weights weights, const BackendOptions& options,
                           const Progress& progress);

}  // namespace qwen2vl
