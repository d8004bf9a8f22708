#pragma once

#include <map>
#include <memory>
#include <vector>

#include "base/input_file.h"
#include "model/backend_abi.h"
#include "model/config.h"
#include "model/weights.h"

namespace qwen2vl {

/// A model's sizes and weights as plug-ins take them, its files mapped. Points at the numbers of `weights`,
/// which may be moved but neither changed nor destroyed as long as it is used.
class PluginModel {
 public:
  PluginModel(const ModelConfig& config, const Weights& weights);
  PluginModel(const PluginModel&) = delete;
  PluginModel& operator=(const PluginModel&) = delete;

  const qwen2vl_model& get() const { return model_; }
  /// Of the files, where what they say has been copied.
  void release_pages() const;

 private:
  qwen2vl_matrix matrix(const MatrixView& m) const;
  qwen2vl_linear linear(const LinearWeights& w) const;
  qwen2vl_decoder_layer decoder_layer(const DecoderLayerWeights& w) const;
  qwen2vl_vision_block vision_block(const VisionBlockWeights& w) const;

  std::map<const InputFile*, std::unique_ptr<MappedFile>> mappings_;
  std::vector<qwen2vl_decoder_layer> layers_;
  std::vector<qwen2vl_vision_block> blocks_;
  qwen2vl_vision vision_{};
  qwen2vl_model model_{};
};

}  // namespace qwen2vl
