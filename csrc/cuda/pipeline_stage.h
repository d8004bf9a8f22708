#pragma once

#include <optional>
#include <span>
#include <vector>

#include "cuda/kv_cache.h"
#include "cuda/linear.h"

namespace qwen2vl::cuda {

inline constexpr int64_t kMaxBatchRows = 2048;
inline constexpr int64_t kFewRows = 64;  ///< up to so many, weights are read by few_rows; above, expanded

/// Consecutive decoder layers on one device, with their part of the cache. The first stage has the
/// embeddings, the last one the head. Calls are made on the stage's own device, which its constructor makes
/// the thread's: `enter`.
class PipelineStage {
 public:
  PipelineStage(Context& context, const qwen2vl_text& text, bool exact, size_t index);
  ~PipelineStage();
  PipelineStage(const PipelineStage&) = delete;
  PipelineStage& operator=(const PipelineStage&) = delete;

  // Weights: what the stage has of them, then `finish`.
  void load_embeddings(PackingBuffers& buffers);
  void load_layer(const qwen2vl_decoder_layer& layer, PackingBuffers& buffers);
  void load_head(PackingBuffers& buffers);
  void finish();
  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }
  PagePool& pages() { return *pool_; }

  /// The calling thread's device is this one from here on.
  void enter();

  // A call: buffers for its rows (true where they are others than before), where the rows stand, what stands
  // in them; then layer after layer.
  bool reserve(int64_t rows);
  void upload(std::span<const SequenceRows> batch, const PageTables& tables, int64_t rows);
  void embed_tokens(int64_t rows);
  /// Instead of embeddings: the rows that another stage has computed.
  void receive(PipelineStage& from, int64_t rows);
  /// Few rows (kFewRows); `single`: each is the only one of its sequence.
  void layer_few(int64_t index, int64_t rows, int64_t chunks, bool single);
  void layer_many(int64_t index, std::span<const SequenceRows> batch, int64_t rows);
  void layer_plain(int64_t index, int64_t rows);
  /// Logits [rows][vocab] of rows of the residual stream.
  void head(const float* x, int64_t rows, float* logits);
  /// `tokens` [rows], where the host reads them; `advance`: the rows become those of the next step.
  void find_likeliest(int64_t rows, const float* logits, int32_t* tokens, bool advance);

  const float* rows() const { return x_.as<float>(); }  ///< [rows][hidden_size]
  static int64_t chunks_of(int64_t cells);
  int64_t read_weights();  ///< returns their bytes

  Context& ctx;

 private:
  struct Layer {
    const float *input_layernorm, *post_attention_layernorm;
    PackedLinear qkv_proj, o_proj, gate_up_proj, down_proj;  // fast
    StoredLinear q, k, v, o, gate, up, down;                 // exact
  };

  const float* vector(const qwen2vl_vector& v);
  void put_tables(const PageTables& tables);
  uint8_t* const* table(size_t sequence) const;
  Epilogue qkv_epilogue(int64_t layer) const;
  void attend_rows(int64_t layer, int64_t first_row, int64_t rows, int64_t chunks, bool single);

  size_t index_;
  qwen2vl_text text_;
  bool exact_;
  int64_t q_size_, kv_size_, padded_head_dim_;
  std::optional<PagePool> pool_;
  PackedLinear embed_tokens_, lm_head_;
  StoredLinear stored_embed_tokens_, stored_lm_head_;
  std::vector<Layer> layers_;
  const float* norm_ = nullptr;
  const float* inv_freq_ = nullptr;

  const PageTables* page_tables_ = nullptr;  // of the call at work
  std::vector<uint8_t*> addresses_;          // of their pages, which tables_ has
  int64_t tables_version_ = 0;
  DeviceBuffer tables_;

  int64_t reserved_rows_ = 0;
  DeviceBuffer row_info_, embeddings_;  // RowInfo [rows], [rows][hidden]
  PinnedBuffer staged_info_;
  cudaEvent_t staged_ = nullptr;  // staged_info_ and addresses_ have been read
  cudaEvent_t sent_ = nullptr;    // the rows have gone to the next stage
  cudaEvent_t idle_ = nullptr;    // the calls before have done their work here
  DeviceBuffer x_, rotation_;     // [rows][hidden], [rows][2 half]
  DeviceBuffer normed_, queries_, attended_,
      wide_;  // bf16 [rows][stride]; f16 [rows][heads][head_dim]; bf16; bf16
  DeviceBuffer qkv_, gate_, up_, float_attended_, float_normed_;  // exact
  DeviceBuffer expanded_;                                         // a layer's weights as bf16
  DeviceBuffer parts_, arrived_, likeliest_parts_, likeliest_arrived_;
};

}  // namespace qwen2vl::cuda
