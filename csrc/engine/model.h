#pragma once

#include <filesystem>

#include "engine/backend_registry.h"
#include "model/config.h"
#include "model/weights.h"

namespace qwen2vl {

/// A model's file, or two of them, with all checks made that are not a backend's.
struct ModelFiles {
  ModelConfig config;
  Weights weights;  ///< views: of the data, norms and biases alone have been read
};

/// `mmproj`: the vision tower's file where it is not in the model's own; empty: none.
ModelFiles open_model(const std::filesystem::path& path, const std::filesystem::path& mmproj,
                      LowRankUpdates updates = {}, Types types = Types::Computed);

struct ModelOptions {
  std::filesystem::path mmproj;  ///< the vision tower's file where it is not in the model's own; empty: none
  BackendOptions backend;
  LowRankUpdates updates = {};  ///< of its matrices
};

}  // namespace qwen2vl
