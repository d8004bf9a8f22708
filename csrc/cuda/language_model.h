#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "cuda/kv_cache.h"
#include "cuda/linear.h"

namespace qwen2vl::cuda {

using Report = std::function<void(int64_t done, int64_t total)>;  ///< throws to cancel

inline constexpr int64_t kMaxBatchRows = 2048;
inline constexpr int64_t kFewRows = 64;  ///< up to so many, weights are read by few_rows; above, expanded

/// Qwen2VLTextModel's forward pass with M-RoPE and the head, on one device.
///
/// Up to kFewRows rows go through few_rows.cuh, more through products of many rows; `exact` through the plain
/// kernels. Decoding steps are captured once as a graph, for a number of rows and of chunks of attention.
/// Who asks for the likeliest token will append it: the step after it is begun before its token is known
/// here, since the device has it (step.cuh); another token, or another sequence, and it is forgotten.
class LanguageModel {
 public:
  LanguageModel(Context& ctx, const qwen2vl_text& text, bool exact, const Report& report);
  ~LanguageModel();

  PagePool& pages() { return pool_; }
  const PagePool& pages() const { return pool_; }

  /// See Backend::forward; logits null: they stay here until the next call, for likeliest and kept_logits.
  void operator()(std::span<const SequenceRows> batch, float* logits, const Report& report);
  int32_t likeliest(int64_t row);
  void kept_logits(int64_t row, float* out);

  int64_t read_weights();  ///< returns their bytes

 private:
  struct Layer {
    const float *input_layernorm, *post_attention_layernorm;
    PackedLinear qkv_proj, o_proj, gate_up_proj, down_proj;  // fast
    StoredLinear q, k, v, o, gate, up, down;                 // exact
  };
  /// What a call leaves: two of them, since a step may be ahead.
  struct Result {
    int64_t rows = 0;
    DeviceBuffer logits;  // [rows][vocab]
    PinnedBuffer tokens;  // [kFewRows]
    cudaEvent_t done = nullptr;
  };
  struct Graph {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
  };

  void reserve(int64_t rows);
  int64_t upload(std::span<const SequenceRows> batch);
  void embed_tokens(int64_t rows);
  Epilogue qkv_epilogue(int64_t layer) const;
  void attend_rows(int64_t layer, int64_t first_row, int64_t rows, int64_t chunks, bool single);
  void layer_few(int64_t index, int64_t rows, int64_t chunks, bool single);
  void layer_many(int64_t index, std::span<const SequenceRows> batch, int64_t rows);
  void layer_plain(int64_t index, int64_t rows);
  void head(const float* x, int64_t rows, float* logits);
  void find_likeliest(int64_t rows, Result& result, bool advance);
  void decode(int64_t rows, int64_t chunks, int slot);
  void run_step(int64_t rows, int64_t chunks, int slot);
  void drop_graphs();
  void step(std::span<const SequenceRows> batch, const Report& report);
  void remember(std::span<const SequenceRows> batch);
  bool is_ahead(std::span<const SequenceRows> batch);
  Result& kept(int64_t row);
  static int64_t chunks_of(int64_t cells);

  Context& ctx_;
  qwen2vl_text text_;
  bool exact_;
  int64_t q_size_, kv_size_, padded_head_dim_;
  PagePool pool_;
  PageTables tables_;
  PackedLinear embed_tokens_, lm_head_;
  StoredLinear stored_embed_tokens_, stored_lm_head_;
  std::vector<Layer> layers_;
  const float* norm_ = nullptr;
  const float* inv_freq_ = nullptr;

  int64_t reserved_rows_ = 0;
  DeviceBuffer row_info_, embeddings_;  // RowInfo [rows], [rows][hidden]
  PinnedBuffer staged_info_;
  cudaEvent_t staged_ = nullptr;  // staged_info_ and tables_ have been read
  DeviceBuffer x_, rotation_;     // [rows][hidden], [rows][2 half]
  DeviceBuffer normed_, queries_, attended_,
      wide_;  // bf16 [rows][stride]; f16 [rows][heads][head_dim]; bf16; bf16
  DeviceBuffer qkv_, gate_, up_, float_attended_, float_normed_;  // exact
  DeviceBuffer expanded_;                                         // a layer's weights as bf16
  DeviceBuffer parts_, arrived_, likeliest_parts_, likeliest_arrived_, head_rows_, head_logits_;
  std::array<Result, 2> results_;
  int current_ = 0;                                 // the last call's; a step ahead writes the other
  std::map<std::array<int64_t, 3>, Graph> graphs_;  // rows, chunks, which result
  struct {
    bool at_work = false;  // the step after the last one, before it was asked for
    int64_t cell = 0;
    int32_t position = 0;
  } ahead_;
  struct {
    bool greedy = false;  // the likeliest token was asked for
    const uint8_t* page = nullptr;
    int64_t cells = 0;
  } last_;  // the one sequence of the last call: its last page, what it has computed
};

}  // namespace qwen2vl::cuda
