#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "cuda/pipeline_stage.h"

namespace qwen2vl::cuda {

using Report = std::function<void(int64_t done, int64_t total)>;  ///< throws to cancel

/// One device after another, each opened when it is needed.
class Devices {
 public:
  /// `first`, and with `more` those behind it that the kernels run on. memory_bytes: of Context's.
  Devices(int first, bool more, int64_t memory_bytes);
  /// The next one, or null.
  Context* open_next();
  std::span<const std::unique_ptr<Context>> opened() const { return opened_; }
  Context& first() const { return *opened_[0]; }
  /// With the most room for weights.
  Context& roomiest() const;

 private:
  int next_;
  bool more_;
  int64_t memory_bytes_;
  std::vector<std::unique_ptr<Context>> opened_;
};

/// Qwen2VLTextModel's forward pass with M-RoPE and the head: the layers in sequence on as many devices as
/// hold them. What none has room for stays in the host's memory.
///
/// Up to kFewRows rows go through few_rows.cuh, more through products of many rows; `exact` through the plain
/// kernels. On one device, decoding steps are captured once as a graph, for a number of rows and of chunks of
/// attention, and who asks for the likeliest token will append it: the step after it is begun before its
/// token is known here, since the device has it (step.cuh); another token, or another sequence, and it is
/// forgotten.
class LanguageModel {
 public:
  LanguageModel(Devices& devices, const qwen2vl_text& text, bool exact, const Report& report);
  ~LanguageModel();

  Page* new_page();
  void free_page(Page* page) noexcept { free_pages_.push_back(page); }  // which has room for all
  void copy_page(const Page* from, Page* to);
  int64_t page_bytes() const;

  /// See Backend::forward; logits null: they stay here until the next call, for likeliest and kept_logits.
  void operator()(std::span<const SequenceRows> batch, float* logits, const Report& report);
  int32_t likeliest(int64_t row);
  void kept_logits(int64_t row, float* out);

  int64_t read_weights();  ///< returns their bytes

 private:
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

  PipelineStage& first() { return *stages_.front(); }
  PipelineStage& last() { return *stages_.back(); }
  int64_t upload(std::span<const SequenceRows> batch);
  /// Every stage's part of a call: layer(stage, its layer's index, the model's).
  template <typename Fn>
  void run_layers(int64_t rows, const Fn& layer);
  void give_room(Result& result, int64_t rows);
  void decode(int64_t rows, int64_t chunks, int slot);
  void run_step(int64_t rows, int64_t chunks, int slot);
  void drop_graphs();
  void step(std::span<const SequenceRows> batch, const Report& report);
  void remember(std::span<const SequenceRows> batch);
  bool is_ahead(std::span<const SequenceRows> batch);
  Result& kept(int64_t row);

  qwen2vl_text text_;
  bool exact_;
  std::vector<std::unique_ptr<PipelineStage>> stages_;
  std::vector<std::unique_ptr<Page>> pages_;
  std::vector<Page*> free_pages_;
  PageTables tables_;
  DeviceBuffer head_rows_, head_logits_;
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
    const Page* page = nullptr;
    int64_t cells = 0;
  } last_;  // the one sequence of the last call: its last page, what it has computed
};

}  // namespace qwen2vl::cuda
