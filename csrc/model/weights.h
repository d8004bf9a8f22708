#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gguf/reader.h"
#include "model/config.h"
#include "quant/block_types.h"

namespace qwen2vl {

/// A weight matrix [rows = out_features, cols = in_features] in GGUF's row-major blocks, in a file or in
/// memory.
struct MatrixView {
  DType type = DType::F32;
  int64_t rows = 0;
  int64_t cols = 0;
  const uint8_t* data = nullptr;    ///< where it lies in memory, else nullptr
  const InputFile* file = nullptr;  ///< in which it starts at `offset`
  uint64_t offset = 0;

  /// Rows [begin, begin + n): where they lie in memory, or read from the file into `room`, which has place
  /// for them.
  const uint8_t* read_rows(int64_t begin, int64_t n, uint8_t* room) const;
};

using Vector = std::vector<float>;  ///< norms and biases, always float32

/// What LoRA adapters (arXiv 2106.09685) add to a matrix [rows, cols], which itself stays as it is: b a.
struct LowRankUpdate {
  int64_t rank = 0;  ///< 0: nothing
  Vector a;          ///< [rank, cols]
  Vector b;          ///< [rows, rank], scaled
};
/// By the tensors' names. The patch embedding's, [embed_dim, patch_dim], goes by its first slice's name; the
/// tower's fc1 is ffn_up, fc2 ffn_down, whatever a file calls them; a tied head's is output.weight's.
using LowRankUpdates = std::map<std::string, LowRankUpdate>;

/// torch.nn.Linear: y = x (weight + update)^T + bias. The bias is empty where there is none.
struct LinearWeights {
  MatrixView weight;
  Vector bias;
  LowRankUpdate update = {};
};

struct NormWeights {
  Vector weight;
  Vector bias;  ///< empty for an RMSNorm
};

struct DecoderLayerWeights {
  NormWeights input_layernorm;           // [hidden]
  LinearWeights q_proj, k_proj, v_proj;  // [q_size | kv_size | kv_size, hidden] + bias
  LinearWeights o_proj;                  // [hidden, q_size]
  NormWeights post_attention_layernorm;  // [hidden]
  LinearWeights gate_proj, up_proj;      // [intermediate, hidden]
  LinearWeights down_proj;               // [hidden, intermediate]
};

struct TextWeights {
  MatrixView embed_tokens;            // [vocab, hidden]
  LowRankUpdate embed_tokens_update;  // of the look-up alone
  std::vector<DecoderLayerWeights> layers;
  NormWeights norm;                   // [hidden]
  std::optional<MatrixView> lm_head;  // [vocab, hidden]; embed_tokens where tied
  LowRankUpdate lm_head_update;
};

struct VisionBlockWeights {
  NormWeights norm1;      // [embed_dim]
  LinearWeights q, k, v;  // [embed_dim, embed_dim]
  LinearWeights proj;     // [embed_dim, embed_dim]
  NormWeights norm2;      // [embed_dim]
  LinearWeights fc1;      // [intermediate, embed_dim]
  LinearWeights fc2;      // [embed_dim, intermediate]
};

struct VisionWeights {
  MatrixView patch_embed[2];  // per frame of the temporal patch: [embed_dim, in_channels * patch * patch]
  LowRankUpdate patch_embed_update;  // of both together: [embed_dim, patch_dim]
  std::vector<VisionBlockWeights> blocks;
  NormWeights ln_q;            // [embed_dim]
  LinearWeights mlp_0, mlp_2;  // [4 embed_dim, 4 embed_dim], [hidden, 4 embed_dim] (4 = merge_unit)
};

struct Weights {
  std::vector<std::unique_ptr<gguf::File>> files;  ///< that the matrices lie in
  TextWeights text;
  std::optional<VisionWeights> vision;
  bool is_updated = false;  ///< whether any LowRankUpdate is there
};

enum class Types {
  Computed,  ///< UnsupportedError names a tensor of another one
  Any,       ///< a matrix of another one is an empty view
};

/// Views of every tensor of `files` that the configuration asks for. One FormatError lists all tensors that
/// are missing or misshapen.
/// std::invalid_argument for an update of no matrix of the model, or of another shape.
Weights load_weights(std::vector<std::unique_ptr<gguf::File>> files, const ModelConfig& config,
                     LowRankUpdates updates = {}, Types types = Types::Computed);

}  // namespace qwen2vl
