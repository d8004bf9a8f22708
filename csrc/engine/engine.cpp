#include "engine/engine.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <utility>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace qwen2vl {

Engine::Engine(const std::filesystem::path& path, ModelOptions options, const Progress& progress)
    : precision_(options.backend.precision) {
  const BackendRegistry backends(options.backend);
  ModelFiles files = open_model(path, options.mmproj, std::move(options.updates));
  config_ = std::move(files.config);
  chosen_ = backends.make(config_, std::move(files.weights), progress);
  pool_ = std::make_unique<PagePool>(chosen_.backend->pages(), std::numeric_limits<int64_t>::max());
#ifdef __GLIBC__
  malloc_trim(0);  // what reading the vocabulary has left behind
#endif
}

// --- pages ---

void Engine::set_cache_bytes(int64_t bytes) {
  const Turn turn(*this);
  pool_->set_budget(bytes);
}

int64_t Engine::idle_pages() {
  const Turn turn(*this);
  return pool_->idle_pages();
}

int64_t Engine::cell_bytes() const {
  const PageStore& store = chosen_.backend->pages();
  return store.page_bytes() / store.page_cells();
}

int64_t Engine::bytes(const Sequence& sequence) const {
  return std::ssize(sequence.table.pages) * chosen_.backend->pages().page_bytes();
}

void Engine::forget() {
  const Turn turn(*this);
  pool_->forget();
}

void Engine::abandon(Sequence&& sequence) noexcept {
  {
    const std::lock_guard lock(abandoned_mutex_);
    abandoned_.push_back(std::move(sequence.table));
  }
  if (!call_lock_.try_lock()) return;
  give_back_abandoned();
  cache_bytes_ = pool_->bytes();
  call_lock_.unlock();
}

void Engine::give_back_abandoned() noexcept {
  std::vector<PageTable> tables;
  {
    const std::lock_guard lock(abandoned_mutex_);
    tables.swap(abandoned_);
  }
  for (PageTable& table : tables) pool_->release(table);
}

// --- sequences ---

int64_t Engine::reuse(Sequence& sequence, const Prompt& prompt) {
  const Turn turn(*this);
  const int64_t limit = std::min(sequence.size(), prompt.size() - 1);
  int64_t common = 0;
  while (common < limit && sequence.cells[common] == prompt.cells()[common]) ++common;
  pool_->truncate(sequence.table, common);
  sequence.drop_waiting();
  sequence.drop_logits();
  return common;
}

int64_t Engine::adopt(Sequence& sequence, const Prompt& prompt) {
  const Turn turn(*this);
  pool_->release(sequence.table);
  sequence.table = pool_->find(std::span(prompt.cells()).first(prompt.size() - 1));
  const int64_t n = sequence.size();
  sequence.resize(0);
  sequence.token_ids.assign(prompt.token_ids().begin(), prompt.token_ids().begin() + n);
  sequence.cells.assign(prompt.cells().begin(), prompt.cells().begin() + n);
  sequence.positions.assign(prompt.positions().begin(), prompt.positions().begin() + n);
  sequence.drop_logits();
  return n;
}

void Engine::begin(Sequence& sequence, const Prompt& prompt,
                   std::span<const std::shared_ptr<const Embeddings>> embeddings) const {
  if (embeddings.size() != prompt.items().size())
    throw std::invalid_argument("embeddings: expected one entry for each of " +
                                std::to_string(prompt.items().size()) + " image(s), found " +
                                std::to_string(embeddings.size()));
  if (prompt.size() > sequence.n_ctx)
    throw std::invalid_argument("the prompt has " + std::to_string(prompt.size()) +
                                " tokens, the context holds " + std::to_string(sequence.n_ctx));
  const int64_t first = sequence.size();
  if (first >= prompt.size() ||
      !std::equal(sequence.cells.begin(), sequence.cells.begin() + first, prompt.cells().begin()))
    throw std::invalid_argument("the cache is not a prefix of the prompt: call reuse first");
  std::vector<Sequence::Item> items;
  for (size_t i = 0; i < embeddings.size(); ++i) {
    const VisionItem& item = prompt.items()[i];
    const int64_t cells = item.end - item.start;
    const Embeddings* rows = embeddings[i].get();
    if (rows != nullptr && (rows->rows() != cells || rows->hidden_size() != config_.text.hidden_size))
      throw std::invalid_argument("embeddings[" + std::to_string(i) + "]: expected shape (" +
                                  std::to_string(cells) + ", " + std::to_string(config_.text.hidden_size) +
                                  "), found (" + std::to_string(rows->rows()) + ", " +
                                  std::to_string(rows->hidden_size()) + ")");
    if (item.end <= first) continue;
    if (rows == nullptr)
      throw std::invalid_argument("image " + std::to_string(i) +
                                  ": its embeddings are needed and were not given");
    items.push_back({item.start, embeddings[i]});
  }
  sequence.guessed = 0;
  sequence.prompt_cells = prompt.size();
  sequence.token_ids = prompt.token_ids();
  sequence.cells = prompt.cells();
  sequence.positions = prompt.positions();
  sequence.items = std::move(items);
  int32_t largest = 0;  // of the whole prompt, what has been computed included
  for (const Position& p : prompt.positions()) largest = std::max({largest, p[0], p[1], p[2]});
  sequence.next_position = largest + 1;
  sequence.drop_logits();
}

void Engine::require_token(int32_t token) const {
  if (token < 0 || token >= config_.text.vocab_size)
    throw std::invalid_argument("token: expected an id below " + std::to_string(config_.text.vocab_size) +
                                ", found " + std::to_string(token));
}

void Engine::require_pushable(const Sequence& sequence, int32_t token) const {
  if (sequence.cells.empty()) throw std::invalid_argument("accept: nothing has been evaluated yet");
  require_token(token);
  if (sequence.size() + sequence.waiting() >= sequence.n_ctx)
    throw std::invalid_argument("the context is full: it holds " + std::to_string(sequence.n_ctx) +
                                " tokens");
  if (sequence.logits.empty()) throw std::invalid_argument("accept: the last prefill was not finished");
}

void Engine::push(Sequence& sequence, int32_t token) {
  require_pushable(sequence, token);
  const int64_t next = sequence.size();
  if (sequence.guessed > 0 && sequence.token_ids[next] == token) {
    const Turn turn(*this);
    pool_->commit(sequence.table, std::span(sequence.cells).subspan(next, 1));
    --sequence.guessed;
    ++sequence.next_position;
    sequence.logits.erase(sequence.logits.begin());
    return;
  }
  sequence.resize(next);
  sequence.append(token, sequence.next_position++);
  sequence.drop_logits();
}

int64_t Engine::guess(Sequence& sequence, std::span<const int32_t> tokens) const {
  if (!can_guess()) throw std::invalid_argument("guess: this device computes tokens one at a time");
  if (sequence.waiting() != 1 || sequence.size() < sequence.prompt_cells)
    throw std::invalid_argument("guess: expected a drawn token that waits");
  for (const int32_t token : tokens) require_token(token);
  const int64_t known = sequence.size() + 1, page = chosen_.backend->pages().page_cells();
  const int64_t room = std::min(sequence.size() / page * page + page, sequence.n_ctx) - known;
  sequence.resize(known);
  for (const int32_t token : tokens.first(static_cast<size_t>(std::min(room, std::ssize(tokens)))))
    sequence.append(token, sequence.next_position + static_cast<int32_t>(sequence.guessed++));
  return sequence.guessed;
}

void Engine::step(std::span<const StepRows> batch, const Progress& progress) {
  if (batch.empty()) return;
  require_batch(batch);
  Turn turn(*this);
  for (const StepRows& s : batch) pool_->reserve(s.sequence->table, s.cells());
  compute(turn.backend, batch, progress);
  for (const StepRows& s : batch) {
    Sequence& sequence = *s.sequence;
    pool_->commit(sequence.table, std::span(sequence.cells).subspan(sequence.size(), s.rows));
    std::erase_if(sequence.items, [&](const Sequence::Item& item) {
      return item.start + item.embeddings->rows() <= sequence.size();
    });
  }
}

void Engine::require_batch(std::span<const StepRows> batch) const {
  const int64_t most = backend().max_batch_rows();
  int64_t rows = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    const StepRows& s = batch[i];
    if (std::any_of(batch.begin(), batch.begin() + static_cast<std::ptrdiff_t>(i),
                    [&](const StepRows& other) { return other.sequence == s.sequence; }))
      throw std::invalid_argument("step: expected different sequences of one model");
    if (s.rows < 1 || s.rows > s.sequence->waiting())
      throw std::invalid_argument("step: expected 1 to " + std::to_string(s.sequence->waiting()) +
                                  " rows of a sequence, found " + std::to_string(s.rows));
    if (s.all_logits != nullptr && batch.size() > 1)
      throw std::invalid_argument("step: all rows' logits are those of one sequence");
    if (s.all_logits != nullptr && s.sequence->guessed > 0)
      throw std::invalid_argument("step: all rows' logits are those of a sequence that guesses nothing");
    rows += s.cells();
  }
  if (rows > most)
    throw std::invalid_argument("step: expected " + std::to_string(most) + " rows at most, found " +
                                std::to_string(rows));
}

/// The forward pass; the logits of sequences that have no cells to wait for behind these rows.
void Engine::compute(Backend& backend, std::span<const StepRows> batch, const Progress& progress) {
  const int64_t vocab = config_.text.vocab_size;
  for (const StepRows& s : batch) s.sequence->drop_logits();
  // The others' must not be lost.
  for (const std::weak_ptr<Logits>& kept : std::exchange(kept_, {}))
    if (const std::shared_ptr<Logits> logits = kept.lock()) fetch(backend, *logits);
  embeddings_.clear();
  pages_.clear();
  for (const StepRows& s : batch) {
    const Sequence& sequence = *s.sequence;
    for (const CachedPage* page : sequence.table.pages) pages_.push_back(page->handle);
    const int64_t first = sequence.size(), end = first + s.rows;
    const size_t row = embeddings_.size();
    embeddings_.resize(row + static_cast<size_t>(s.cells()), nullptr);
    for (const Sequence::Item& item : sequence.items)
      for (int64_t at = std::max(first, item.start),
                   last = std::min(end, item.start + item.embeddings->rows());
           at < last; ++at)
        embeddings_[row + static_cast<size_t>(at - first)] = item.embeddings->row(at - item.start);
  }
  std::vector<SequenceRows> rows;
  rows.reserve(batch.size());
  std::vector<Sequence*> finished;  // of each row of logits
  size_t row = 0, page = 0;
  for (const StepRows& s : batch) {
    Sequence& sequence = *s.sequence;
    const size_t first = static_cast<size_t>(sequence.size()), n = static_cast<size_t>(s.cells());
    const size_t n_pages = sequence.table.pages.size();
    const bool last = s.rows == sequence.waiting(), guesses = n > static_cast<size_t>(s.rows);
    if (last) finished.insert(finished.end(), n - static_cast<size_t>(s.rows) + 1, &sequence);
    rows.push_back({std::span(pages_).subspan(page, n_pages), sequence.size(),
                    std::span(sequence.token_ids).subspan(first, n), std::span(embeddings_).subspan(row, n),
                    std::span(sequence.positions).subspan(first, n),
                    s.all_logits != nullptr || guesses ? LogitsWanted::All
                    : last                             ? LogitsWanted::Last
                                                       : LogitsWanted::None,
                    sequence.size() >= sequence.prompt_cells});
    row += n;
    page += n_pages;
  }
  const bool all = batch[0].all_logits != nullptr, kept = backend.keeps_logits() && !all;
  float* logits = batch[0].all_logits;
  if (!all && !kept && !finished.empty()) {
    if (!logits_ || logits_.use_count() > 1) logits_ = std::make_shared<std::vector<float>>();
    logits_->resize(std::max(logits_->size(), finished.size() * static_cast<size_t>(vocab)));
    logits = logits_->data();
  }
  backend.forward(rows, logits, progress);
  for (size_t i = 0; i < finished.size() && !all; ++i) {
    const auto result = std::make_shared<Logits>();
    finished[i]->logits.push_back(result);
    if (kept) {
      result->kept_row = static_cast<int64_t>(i);
      kept_.push_back(result);
    } else {
      result->values = {logits_, logits + static_cast<int64_t>(i) * vocab};
    }
  }
}

void Engine::evaluate(Sequence& sequence, const Progress& progress, float* all_logits) {
  const int64_t total = sequence.waiting(), chunk = backend().max_batch_rows();
  for (int64_t done = 0; done < total; done += chunk) {
    const int64_t n = std::min(chunk, total - done);
    const StepRows rows{&sequence, n,
                        all_logits == nullptr ? nullptr : all_logits + done * config_.text.vocab_size};
    step({&rows, 1}, [&](int64_t layer, int64_t layers) { progress(done + n * layer / layers, total); });
  }
}

void Engine::fetch(Backend& backend, Logits& logits) const {
  if (logits.values) return;
  const auto row = std::make_shared<std::vector<float>>(static_cast<size_t>(config_.text.vocab_size));
  backend.kept_logits(logits.kept_row, row->data());
  logits.values = {row, row->data()};
}

std::span<const float> Engine::logits(Sequence& sequence) {
  Turn turn(*this);
  if (sequence.logits.empty()) return {};
  Logits& logits = *sequence.logits.front();
  fetch(turn.backend, logits);
  return {logits.values.get(), static_cast<size_t>(config_.text.vocab_size)};
}

int32_t Engine::sample(Sequence& sequence, Sampler& sampler, std::span<const uint8_t> allowed) {
  Turn turn(*this);
  if (sequence.logits.empty()) throw std::invalid_argument("sample: nothing has been evaluated yet");
  Logits& logits = *sequence.logits.front();
  if (!logits.values && sampler.is_greedy() && allowed.empty()) {
    const int32_t token = turn.backend.likeliest(logits.kept_row);
    if (token < 0) throw damaged_logits();
    return token;
  }
  fetch(turn.backend, logits);
  return sampler.sample({logits.values.get(), static_cast<size_t>(config_.text.vocab_size)},
                        sequence.known_tokens(), allowed, static_cast<size_t>(sequence.prompt_cells));
}

LogProbabilities Engine::log_probabilities(Sequence& sequence, int32_t token, size_t top) {
  const std::span<const float> values = logits(sequence);
  if (values.empty()) throw std::invalid_argument("log_probabilities: nothing has been evaluated yet");
  return qwen2vl::log_probabilities(values, token, top);
}

}  // namespace qwen2vl
