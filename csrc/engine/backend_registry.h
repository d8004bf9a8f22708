#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "model/backend.h"
#include "model/weights.h"

namespace qwen2vl {

struct BackendOptions {
  std::string device = "cpu";  ///< a backend's name, with a device's index ("cuda:1"; else its first, and
                               ///< those behind it where that does not hold the model); "auto"
  Precision precision = Precision::Fast;
  int n_threads = 0;             ///< of the CPU; 0: default_thread_count()
  std::string isa;               ///< of the CPU; empty: the best one
  std::filesystem::path plugin;  ///< a library with another backend; empty: none is installed
  int64_t device_memory = 0;     ///< bytes of a device's memory that may be used; 0: what is free
};

struct ChosenBackend {
  std::unique_ptr<Backend> backend;
  std::string note;  ///< why "auto" has not taken a device whose plug-in is there; else empty
};

/// The backends that there are: the processor's, and what a plug-in brings. The one place that knows them
/// all.
class BackendRegistry {
 public:
  /// Throws std::invalid_argument where `options.device` is no name, DeviceError where no backend is called
  /// that or the plug-in cannot be used.
  explicit BackendRegistry(BackendOptions options);
  BackendRegistry(const BackendRegistry&) = delete;
  BackendRegistry& operator=(const BackendRegistry&) = delete;

  /// DeviceError, saying why, where the one that was asked for is not there or does not take the model.
  ChosenBackend make(const ModelConfig& config, Weights weights, const Progress& progress) const;

 private:
  /// `weights` are moved from only where it succeeds.
  using Factory = std::function<std::unique_ptr<Backend>(const ModelConfig& config, Weights&& weights,
                                                         const Progress& progress)>;

  void add_plugin();

  BackendOptions options_;
  std::string
      name_;  ///< of the backend that was asked for; "auto": a plug-in's where it works, else the CPU's
  std::optional<int32_t> index_;  ///< of its devices, where one is named
  std::map<std::string, Factory, std::less<>> factories_;
  std::string note_;
};

}  // namespace qwen2vl
