#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/language_model.h"

namespace qwen2vl::cuda {
namespace {

constexpr int64_t kHeadRows = 64;  // of which logits are computed together, where all are wanted

/// Of a matrix on a device: in tiles, or as its file has it.
int64_t matrix_bytes(const qwen2vl_matrix& matrix, bool exact) {
  if (!exact || matrix.data == nullptr) return packed_bytes(matrix);
  return matrix.rows * row_bytes(static_cast<DType>(matrix.type), matrix.cols);
}

/// Of a layer's weights on a device, at most.
int64_t layer_bytes(const qwen2vl_decoder_layer& layer, bool exact) {
  constexpr int64_t kAligned = 16 * 256;  // what aligning its parts may take
  int64_t bytes =
      kAligned + 4 * (layer.input_layernorm.weight.size + layer.post_attention_layernorm.weight.size);
  for (const qwen2vl_linear* linear : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
                                       &layer.gate_proj, &layer.up_proj, &layer.down_proj})
    bytes += matrix_bytes(linear->weight, exact) + 4 * (linear->bias.size + 2 * kTilePairs);
  return bytes;
}

}  // namespace

Devices::Devices(int first, bool more, int64_t memory_bytes)
    : next_(first), more_(more), memory_bytes_(memory_bytes) {
  opened_.push_back(std::make_unique<Context>(next_++, memory_bytes_));
}

Context* Devices::open_next() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "looking for devices");
  while (more_ && next_ < count) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, next_), "cudaGetDeviceProperties");
    const int device = next_++;
    if (properties.major < kLeastMajor) continue;
    return opened_.emplace_back(std::make_unique<Context>(device, memory_bytes_)).get();
  }
  return nullptr;
}

Context& Devices::roomiest() const {
  return **std::max_element(opened_.begin(), opened_.end(),
                            [](const auto& a, const auto& b) { return a->room() < b->room(); });
}

LanguageModel::LanguageModel(Devices& devices, const qwen2vl_text& text, bool exact, const Report& report)
    : text_(text), exact_(exact) {
  if (text.head_dim > 256)
    throw UnsupportedError("the CUDA backend takes a head_dim of 256 at most, found " +
                           std::to_string(text.head_dim));
  const auto open_stage = [&](Context& ctx) -> PipelineStage& {
    return *stages_.emplace_back(std::make_unique<PipelineStage>(ctx, text_, exact_, stages_.size()));
  };
  std::optional<PackingBuffers> buffers(std::in_place);
  open_stage(devices.first()).load_embeddings(*buffers);
  for (int64_t i = 0; i < text.num_hidden_layers; ++i) {
    // The head stays with the last layer; one that is tied is there already as long as there is one stage.
    int64_t bytes = layer_bytes(text.layers[i], exact);
    if (i + 1 == text.num_hidden_layers)
      bytes += matrix_bytes(
          text.lm_head.data == nullptr && stages_.size() > 1 ? text.embed_tokens : text.lm_head, exact);
    if (bytes > last().ctx.room() && last().layers() > 0)
      if (Context* next = devices.open_next()) {
        buffers.emplace();  // they are a device's
        open_stage(*next);
      }
    last().load_layer(text.layers[i], *buffers);
    report(i + 1, text.num_hidden_layers);
  }
  last().load_head(*buffers);
  for (const auto& stage : stages_) {
    stage->enter();
    stage->finish();
  }
  for (Result& result : results_) {
    result.tokens = PinnedBuffer(kFewRows * 4);
    check(cudaEventCreateWithFlags(&result.done, cudaEventDisableTiming), "cudaEventCreate");
  }
}

LanguageModel::~LanguageModel() {
  for (const auto& stage : stages_) (void)cudaStreamSynchronize(stage->ctx.stream);
  drop_graphs();
  for (Result& result : results_)
    if (result.done != nullptr) (void)cudaEventDestroy(result.done);
}

void LanguageModel::drop_graphs() {
  for (auto& [key, graph] : graphs_) {
    if (graph.exec != nullptr) (void)cudaGraphExecDestroy(graph.exec);
    if (graph.graph != nullptr) (void)cudaGraphDestroy(graph.graph);
  }
  graphs_.clear();
}

// --- pages -------------------------------------------------------------------------------------------------

/// A page has its memory for good: its handle says where that is.
Page* LanguageModel::new_page() {
  if (free_pages_.empty()) {
    auto page = std::make_unique<Page>();
    try {
      for (const auto& stage : stages_) {
        stage->enter();
        page->parts.push_back(stage->pages().take());
      }
      free_pages_.reserve(pages_.size() + 1);
      pages_.push_back(std::move(page));
    } catch (...) {
      for (size_t i = 0; page && i < page->parts.size(); ++i) stages_[i]->pages().give_back(page->parts[i]);
      throw;
    }
    free_pages_.push_back(pages_.back().get());
  }
  Page* page = free_pages_.back();
  free_pages_.pop_back();
  return page;
}

void LanguageModel::copy_page(const Page* from, Page* to) {
  for (size_t i = 0; i < stages_.size(); ++i) {
    stages_[i]->enter();
    stages_[i]->pages().copy(from->parts[i], to->parts[i]);
  }
}

int64_t LanguageModel::page_bytes() const {
  int64_t bytes = 0;
  for (const auto& stage : stages_) bytes += stage->pages().page_bytes();
  return bytes;
}

// --- the forward pass --------------------------------------------------------------------------------------

int64_t LanguageModel::upload(std::span<const SequenceRows> batch) {
  int64_t rows = 0;
  for (const SequenceRows& s : batch) rows += s.n;
  if (rows > kMaxBatchRows)
    throw std::invalid_argument("a batch has " + std::to_string(kMaxBatchRows) + " rows at most, found " +
                                std::to_string(rows));
  tables_.put(batch);
  for (const auto& stage : stages_) {
    stage->enter();
    if (stage->reserve(rows)) drop_graphs();  // they name the old buffers
    stage->upload(batch, tables_, rows);
  }
  return rows;
}

template <typename Fn>
void LanguageModel::run_layers(int64_t rows, const Fn& layer) {
  int64_t index = 0;
  for (size_t s = 0; s < stages_.size(); ++s) {
    PipelineStage& stage = *stages_[s];
    if (s == 0) {
      stage.enter();
      stage.embed_tokens(rows);
    } else {
      stage.receive(*stages_[s - 1], rows);
    }
    for (int64_t i = 0; i < stage.layers(); ++i) layer(stage, i, index++);
  }
}

// Qwen2VLTextModel.forward and the head
void LanguageModel::operator()(std::span<const SequenceRows> batch, float* logits, const Report& report) {
  const bool steps = std::all_of(batch.begin(), batch.end(), [](const SequenceRows& s) {
    return s.n == 1 && s.logits == 1 && s.embeddings[0] == nullptr;
  });
  if (steps && logits == nullptr && !exact_ && static_cast<int64_t>(batch.size()) <= kFewRows)
    return step(batch, report);

  ahead_.at_work = false;
  const int64_t rows = upload(batch);
  int64_t chunks = 1;
  for (const SequenceRows& s : batch) chunks = std::max(chunks, PipelineStage::chunks_of(s.first_cell + s.n));
  run_layers(rows, [&](PipelineStage& stage, int64_t i, int64_t index) {
    report(index, text_.num_hidden_layers);
    if (exact_)
      stage.layer_plain(i, rows);
    else if (rows <= kFewRows)
      stage.layer_few(i, rows, chunks, false);
    else
      stage.layer_many(i, batch, rows);
  });

  std::vector<int64_t> wanted;
  int64_t row = 0;
  for (const SequenceRows& s : batch) {
    for (int64_t i = s.logits == 2 ? 0 : s.logits == 1 ? s.n - 1 : s.n; i < s.n; ++i)
      wanted.push_back(row + i);
    row += s.n;
  }
  const int64_t hidden = text_.hidden_size, vocab = text_.vocab_size;
  const int64_t n = static_cast<int64_t>(wanted.size());
  results_[current_].rows = 0;
  if (logits == nullptr && n > kFewRows)
    throw std::invalid_argument("logits of " + std::to_string(kFewRows) + " rows at most stay on the device");
  for (int64_t begin = 0; begin < n; begin += kHeadRows) {
    const int64_t some = std::min(kHeadRows, n - begin);
    head_rows_.resize(kHeadRows * hidden * 4);
    for (int64_t i = 0; i < some;) {
      int64_t run = 1;
      while (i + run < some && wanted[begin + i + run] == wanted[begin + i] + run) ++run;
      check(
          cudaMemcpyAsync(head_rows_.as<float>() + i * hidden, last().rows() + wanted[begin + i] * hidden,
                          static_cast<size_t>(run * hidden) * 4, cudaMemcpyDeviceToDevice, last().ctx.stream),
          "copying rows");
      i += run;
    }
    if (logits != nullptr) {
      head_logits_.resize(some * vocab * 4);
      last().head(head_rows_.as<float>(), some, head_logits_.as<float>());
      last().ctx.copy_to_host(logits + begin * vocab, head_logits_.as(), some * vocab * 4);
    } else {
      Result& result = results_[current_];
      give_room(result, some);
      last().head(head_rows_.as<float>(), some, result.logits.as<float>());
      last().find_likeliest(some, result.logits.as<float>(), result.tokens.as<int32_t>(), false);
      check(cudaEventRecord(result.done, last().ctx.stream), "cudaEventRecord");
      result.rows = some;
    }
  }
  remember(batch);
  report(text_.num_hidden_layers, text_.num_hidden_layers);
}

void LanguageModel::remember(std::span<const SequenceRows> batch) {
  const SequenceRows& s = batch[0];
  last_ = {false, batch.size() == 1 ? s.pages.back() : nullptr, s.first_cell + s.n};
}

// --- decoding steps ----------------------------------------------------------------------------------------

/// One token of each sequence.
void LanguageModel::step(std::span<const SequenceRows> batch, const Report& report) {
  const SequenceRows& s = batch[0];
  const bool goes_on = batch.size() == 1 && last_.greedy && s.first_cell == last_.cells &&
                       s.pages[(s.first_cell - 1) / kPageCells] == last_.page;
  const bool ahead = is_ahead(batch);
  ahead_.at_work = false;
  if (ahead) {
    current_ = 1 - current_;
  } else {
    const int64_t rows = upload(batch);
    int64_t chunks = 1;
    for (const SequenceRows& each : batch)
      chunks = std::max(chunks, PipelineStage::chunks_of(each.first_cell + 1));
    decode(rows, chunks, current_);
  }
  results_[current_].rows = static_cast<int64_t>(batch.size());
  remember(batch);
  report(text_.num_hidden_layers, text_.num_hidden_layers);
  const int64_t next = s.first_cell + 1;
  if (!goes_on || stages_.size() > 1 || last().ctx.timer.on() ||
      next / kPageCells >= static_cast<int64_t>(s.pages.size()))
    return;
  decode(1, PipelineStage::chunks_of(next + 1), 1 - current_);
  ahead_ = {true, next, s.positions[0] + 1};
}

/// Whether this step is at work already: greedy decoding goes on with the token that the device has.
bool LanguageModel::is_ahead(std::span<const SequenceRows> batch) {
  const SequenceRows& s = batch[0];
  if (!ahead_.at_work || batch.size() != 1 || s.first_cell != ahead_.cell || !tables_.holds(s) ||
      !std::all_of(s.positions, s.positions + 3, [&](int32_t p) { return p == ahead_.position; }))
    return false;
  const Result& result = kept(0);
  return s.token_ids[0] == result.tokens.as<int32_t>()[0];
}

void LanguageModel::run_step(int64_t rows, int64_t chunks, int slot) {
  Result& result = results_[slot];
  run_layers(rows, [&](PipelineStage& stage, int64_t i, int64_t) { stage.layer_few(i, rows, chunks, true); });
  last().head(last().rows(), rows, result.logits.as<float>());
  last().find_likeliest(rows, result.logits.as<float>(), result.tokens.as<int32_t>(), true);
}

void LanguageModel::give_room(Result& result, int64_t rows) {
  const int64_t bytes = rows * text_.vocab_size * 4;
  if (bytes <= result.logits.bytes()) return;
  last().enter();
  last().ctx.synchronize();
  drop_graphs();
  result.logits.resize(bytes);
}

/// A step of the rows that have been uploaded; it leaves them ready for the likeliest tokens' step.
void LanguageModel::decode(int64_t rows, int64_t chunks, int slot) {
  Result& result = results_[slot];
  give_room(result, rows);
  cudaStream_t stream = last().ctx.stream;
  if (stages_.size() > 1 || last().ctx.timer.on()) {
    run_step(rows, chunks, slot);
  } else {
    // Chunks beyond a sequence's own end at once: graphs for powers of two are enough.
    int64_t most = 1;
    while (most < chunks) most *= 2;
    Graph& graph = graphs_[{rows, most, slot}];
    if (graph.exec == nullptr) {
      check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
      try {
        run_step(rows, most, slot);
      } catch (...) {
        (void)cudaStreamEndCapture(stream, &graph.graph);
        throw;
      }
      check(cudaStreamEndCapture(stream, &graph.graph), "cudaStreamEndCapture");
      check(cudaGraphInstantiate(&graph.exec, graph.graph, 0), "cudaGraphInstantiate");
    }
    check(cudaGraphLaunch(graph.exec, stream), "a decoding step");
  }
  check(cudaEventRecord(result.done, stream), "cudaEventRecord");
}

/// The last call's, when it has been computed.
LanguageModel::Result& LanguageModel::kept(int64_t row) {
  Result& result = results_[current_];
  if (row < 0 || row >= result.rows)
    throw std::invalid_argument("kept logits: expected a row below " + std::to_string(result.rows) +
                                ", found " + std::to_string(row));
  check(cudaEventSynchronize(result.done), "a decoding step");
  return result;
}

int32_t LanguageModel::likeliest(int64_t row) {
  const int32_t token = kept(row).tokens.as<int32_t>()[row];
  last_.greedy = true;
  return token;
}

void LanguageModel::kept_logits(int64_t row, float* out) {
  last().ctx.copy_to_host(out, kept(row).logits.as<float>() + row * text_.vocab_size, text_.vocab_size * 4);
}

int64_t LanguageModel::read_weights() {
  int64_t bytes = 0;
  for (const auto& stage : stages_) {
    stage->enter();
    bytes += stage->read_weights();
  }
  return bytes;
}

}  // namespace qwen2vl::cuda
