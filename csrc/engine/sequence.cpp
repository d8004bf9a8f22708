#include "engine/sequence.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace qwen2vl {

Prompt::Prompt(const ModelConfig& config, std::vector<int32_t> token_ids, std::vector<PromptImage> images)
    : token_ids_(std::move(token_ids)), images_(std::move(images)) {
  if (token_ids_.empty()) throw std::invalid_argument("the prompt is empty");
  for (size_t i = 0; i < token_ids_.size(); ++i)
    if (token_ids_[i] < 0 || token_ids_[i] >= config.text.vocab_size)
      throw std::invalid_argument("token " + std::to_string(i) + ": expected an id below " +
                                  std::to_string(config.text.vocab_size) + ", found " +
                                  std::to_string(token_ids_[i]));
  std::vector<GridTHW> grids;
  for (const PromptImage& image : images_) grids.push_back(image.grid);
  positions_ = mrope_positions(token_ids_, grids, config);

  cells_.resize(token_ids_.size());
  for (size_t i = 0; i < token_ids_.size(); ++i) cells_[i].token = token_ids_[i];
  int64_t end = 0;
  for (size_t i = 0; i < images_.size(); ++i) {
    const PromptImage& image = images_[i];
    image_cells_.push_back(vision_cells(image.grid, *config.vision));
    // mrope_positions has found a run for every grid; the starts given must be those of the runs.
    const int64_t last = image.start + image_cells_[i] - 1;
    const auto is_pad = [&](int64_t at) {
      return token_ids_[at] == config.text.image_token_id || token_ids_[at] == config.text.video_token_id;
    };
    bool fits = image.start >= end && last < size();
    for (int64_t at = end; fits && at < image.start; ++at) fits = !is_pad(at);
    for (int64_t at = image.start; fits && at <= last; ++at) fits = is_pad(at);
    if (!fits)
      throw std::invalid_argument("image " + std::to_string(i) + ": no run of " +
                                  std::to_string(image_cells_[i]) + " pad tokens starts at token " +
                                  std::to_string(image.start));
    for (int64_t c = 0; c < image_cells_[i]; ++c) {
      CellKey& cell = cells_[image.start + c];
      cell.patch = static_cast<int32_t>(c);
      cell.grid = image.grid;
      cell.item = image.key;
    }
    end = last + 1;
  }
}

Sequence::Sequence(std::shared_ptr<Model> model, int64_t n_ctx) : model_(std::move(model)), n_ctx_(n_ctx) {
  if (n_ctx < 1) throw std::invalid_argument("n_ctx: expected 1 or more, found " + std::to_string(n_ctx));
  cache_ = model_->lock().backend.new_cache();
}

int64_t Sequence::reuse(const Prompt& prompt) {
  const Model::Locked locked = model_->lock();
  const int64_t limit = std::min(size(), prompt.size() - 1);
  int64_t common = 0;
  while (common < limit && cells_[common] == prompt.cells()[common]) ++common;
  if (common < size()) {
    cache_->truncate(common);
    cells_.resize(common);
    token_ids_.resize(common);
  }
  forget_logits();
  return common;
}

void Sequence::prefill(const Prompt& prompt, std::span<const float* const> embeddings,
                       const Progress& progress, LogitsWanted wanted, float* all_logits) {
  if (embeddings.size() != prompt.images().size())
    throw std::invalid_argument("expected embeddings of " + std::to_string(prompt.images().size()) +
                                " image(s), found " + std::to_string(embeddings.size()));
  if (prompt.size() > n_ctx_)
    throw std::invalid_argument("the prompt has " + std::to_string(prompt.size()) +
                                " tokens, the context holds " + std::to_string(n_ctx_));
  if (size() >= prompt.size() || !std::equal(cells_.begin(), cells_.end(), prompt.cells().begin()))
    throw std::invalid_argument("the cache is not a prefix of the prompt: call reuse first");

  const int64_t hidden = model_->config().text.hidden_size, vocab = model_->config().text.vocab_size;
  const int64_t first = size(), total = prompt.size() - first;
  std::vector<const float*> rows(total, nullptr);
  for (size_t i = 0; i < embeddings.size(); ++i) {
    const int64_t start = prompt.images()[i].start, cells = prompt.image_cells(i);
    if (start + cells <= first) continue;
    if (embeddings[i] == nullptr)
      throw std::invalid_argument("image " + std::to_string(i) +
                                  ": its embeddings are needed and were not given");
    for (int64_t c = std::max<int64_t>(0, first - start); c < cells; ++c)
      rows[start + c - first] = embeddings[i] + c * hidden;
  }
  // A later accept() must go on from the largest index of the whole prompt, kept part included.
  int32_t largest = 0;
  for (const Position& p : prompt.positions()) largest = std::max({largest, p[0], p[1], p[2]});
  next_position_ = largest + 1;
  forget_logits();

  const bool kept = wanted == LogitsWanted::Last && model_->backend().keeps_logits();
  std::vector<float> last(wanted == LogitsWanted::Last && !kept ? vocab : 0);
  const int64_t chunk = model_->backend().max_batch_rows();
  for (int64_t done = 0; done < total; done += chunk) {
    const int64_t n = std::min(chunk, total - done);
    const bool final_chunk = done + n == total;
    const LogitsWanted chunk_wanted =
        wanted == LogitsWanted::Last && !final_chunk ? LogitsWanted::None : wanted;
    append(std::span(prompt.token_ids()).subspan(first + done, n),
           std::span<const float* const>(rows).subspan(done, n),
           std::span(prompt.positions()).subspan(first + done, n), chunk_wanted,
           wanted == LogitsWanted::All ? all_logits + done * vocab
           : kept                      ? nullptr
                                       : last.data(),
           [&](int64_t layer, int64_t layers) { progress(done + n * layer / layers, total); });
    const auto begin = prompt.cells().begin() + first + done;
    cells_.insert(cells_.end(), begin, begin + n);
  }
  logits_ = std::move(last);
  on_device_ = kept;
}

void Sequence::accept(int32_t token, const Progress& progress) {
  Sequence* self = this;
  accept_together({&self, 1}, {&token, 1}, progress);
}

void Sequence::accept_together(std::span<Sequence* const> sequences, std::span<const int32_t> tokens,
                               const Progress& progress) {
  if (sequences.empty()) return;
  if (sequences.size() != tokens.size())
    throw std::invalid_argument("accept_together: expected a token for each of " +
                                std::to_string(sequences.size()) + " sequences, found " +
                                std::to_string(tokens.size()));
  Model& model = *sequences[0]->model_;
  const int64_t n = static_cast<int64_t>(sequences.size()), vocab = model.config().text.vocab_size;
  if (n > model.backend().max_batch_rows())
    throw std::invalid_argument("accept_together: expected " +
                                std::to_string(model.backend().max_batch_rows()) +
                                " sequences at most, found " + std::to_string(n));
  std::vector<Position> positions;
  std::vector<SequenceRows> batch;
  positions.reserve(sequences.size());
  const float* no_embedding = nullptr;
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& s = *sequences[i];
    if (s.model_.get() != &model ||
        std::find(sequences.begin(), sequences.begin() + i, &s) != sequences.begin() + i)
      throw std::invalid_argument("accept_together: expected different sequences of one model");
    s.require_acceptable(tokens[i]);
    positions.push_back({s.next_position_, s.next_position_, s.next_position_});
    batch.push_back(
        {s.cache_.get(), {&tokens[i], 1}, {&no_embedding, 1}, {&positions[i], 1}, LogitsWanted::Last});
  }
  const bool kept = model.backend().keeps_logits();
  std::vector<float> logits(kept ? 0 : n * vocab);
  for (Sequence* s : sequences) s->on_device_ = false;  // a call that fails may have overwritten them
  model.lock().backend.forward(batch, kept ? nullptr : logits.data(), progress);
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& s = *sequences[i];
    s.token_ids_.push_back(tokens[i]);
    s.cells_.push_back({tokens[i]});
    ++s.next_position_;
    if (kept)
      s.logits_.clear();
    else if (n == 1)
      s.logits_.swap(logits);
    else
      s.logits_.assign(logits.begin() + static_cast<int64_t>(i) * vocab,
                       logits.begin() + static_cast<int64_t>(i + 1) * vocab);
    s.on_device_ = kept;
  }
}

void Sequence::require_acceptable(int32_t token) const {
  const TextConfig& text = model_->config().text;
  if (cells_.empty()) throw std::invalid_argument("accept: nothing has been evaluated yet");
  if (token < 0 || token >= text.vocab_size)
    throw std::invalid_argument("token: expected an id below " + std::to_string(text.vocab_size) +
                                ", found " + std::to_string(token));
  if (size() >= n_ctx_)
    throw std::invalid_argument("the context is full: it holds " + std::to_string(n_ctx_) + " tokens");
  if (logits_.empty() && !on_device_)
    throw std::invalid_argument("accept: the last prefill was not finished");
}

std::span<const float> Sequence::logits() {
  if (logits_.empty() && on_device_) {
    std::vector<float> logits(model_->config().text.vocab_size);
    const Model::Locked locked = model_->lock();
    cache_->last_logits(logits.data());
    logits_ = std::move(logits);
  }
  return logits_;
}

int32_t Sequence::sample(Sampler& sampler) {
  if (logits_.empty() && on_device_ && sampler.is_greedy()) {
    const Model::Locked locked = model_->lock();
    const int32_t token = cache_->likeliest();
    if (token < 0) throw damaged_logits();
    return token;
  }
  const std::span<const float> values = logits();
  if (values.empty()) throw std::invalid_argument("sample: nothing has been evaluated yet");
  return sampler.sample(values, token_ids_);
}

void Sequence::forget_logits() {
  logits_.clear();
  on_device_ = false;
}

void Sequence::append(std::span<const int32_t> ids, std::span<const float* const> rows,
                      std::span<const Position> positions, LogitsWanted wanted, float* logits,
                      const Progress& progress) {
  const SequenceRows batch{cache_.get(), ids, rows, positions, wanted};
  model_->lock().backend.forward({&batch, 1}, logits, progress);
  token_ids_.insert(token_ids_.end(), ids.begin(), ids.end());
}

}  // namespace qwen2vl
