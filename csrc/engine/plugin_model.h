#pragma once

#include <vector>

#include "model/backend_abi.h"
#include "model/config.h"
#include "model/weights.h"

namespace qwen2vl {

/// A model's sizes and weights as plug-ins take them. Points at the numbers of `weights`, which may be moved
/// but neither changed nor destroyed as long as it is used.
class PluginModel {
 public:
  PluginModel(const ModelConfig& config, const Weights& weights);
  PluginModel(const PluginModel&) = delete;
  PluginModel& operator=(const PluginModel&) = delete;

  const qwen2vl_model& get() const { return model_; }

 private:
  std::vector<qwen2vl_decoder_layer> layers_;
  std::vector<qwen2vl_vision_block> blocks_;
  qwen2vl_vision vision_{};
  qwen2vl_model model_{};
};

}  // namespace qwen2vl
