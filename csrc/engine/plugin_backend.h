#pragma once

#include <cstdint>
#include <memory>

#include "model/backend.h"
#include "model/backend_abi.h"
#include "model/weights.h"

namespace qwen2vl {

struct PluginOptions {
  int32_t device = 0;         ///< index in the plug-in's list
  bool more_devices = false;  ///< those behind it, too, where it does not hold the model
  Precision precision = Precision::Fast;
  int64_t memory_bytes = 0;  ///< of the device's memory that may be used; 0: what is free
};

/// The backend of a plug-in. `weights` are moved from only where it succeeds; their files stay open for its
/// life.
std::unique_ptr<Backend> make_plugin_backend(const qwen2vl_backend_api& api, const ModelConfig& config,
                                             Weights&& weights, const PluginOptions& options,
                                             const Progress& progress);

}  // namespace qwen2vl
