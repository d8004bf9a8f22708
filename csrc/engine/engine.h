#pragma once

#include <atomic>
#include <filesystem>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/call_lock.h"
#include "engine/backend_registry.h"
#include "engine/log_probabilities.h"
#include "engine/model.h"
#include "engine/page_pool.h"
#include "engine/prompt.h"
#include "engine/sampler.h"
#include "engine/sequence.h"

namespace qwen2vl {

/// What a step computes of one sequence: the first `rows` of the cells that wait, and where these are all of
/// them, its guesses. `all_logits`: where every row's logits go [rows, vocab_size]; only for a sequence that
/// is alone in its step and guesses nothing.
struct StepRows {
  Sequence* sequence = nullptr;
  int64_t rows = 1;
  float* all_logits = nullptr;

  int64_t cells() const { return rows + (rows == sequence->waiting() ? sequence->guessed : 0); }
};

/// A loaded model: its backend and the pages of all its sequences. Threads may share it: calls go one at a
/// time. Error where one could never begin (CallLock): made by another's progress callback, or in a process
/// that was forked during one.
class Engine {
 public:
  Engine(const std::filesystem::path& path, ModelOptions options, const Progress& progress);

  const ModelConfig& config() const { return config_; }
  Precision precision() const { return precision_; }
  const Backend& backend() const { return *chosen_.backend; }
  /// A warning to the user about where the model computes, or empty.
  std::string note() const { return chosen_.note.empty() ? backend().note() : chosen_.note; }

  /// Exclusive use of the backend for as long as it lives.
  class Turn {
   public:
    explicit Turn(Engine& engine)
        : engine_(engine), lock_(engine.call_lock_), backend(*engine.chosen_.backend) {
      engine.give_back_abandoned();
    }
    ~Turn() {
      engine_.give_back_abandoned();
      engine_.cache_bytes_ = engine_.pool_->bytes();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Engine& engine_;
    std::unique_lock<CallLock> lock_;

   public:
    Backend& backend;
  };

  // --- pages ---

  /// Of all pages at most; without end until it is set.
  void set_cache_bytes(int64_t bytes);
  /// In use, by sequences or kept to be found again, as the last call left them. Waits for nothing.
  int64_t cache_bytes() const { return cache_bytes_; }
  int64_t idle_pages();  ///< those that no sequence uses
  int64_t cell_bytes() const;
  int64_t bytes(const Sequence& sequence) const;  ///< of its pages
  /// Nothing computed so far will be found again. Sequences keep what they have.
  void forget();

  // --- sequences ---

  /// Keeps the longest common prefix of the sequence and `prompt`, short of its last token; returns its
  /// length.
  int64_t reuse(Sequence& sequence, const Prompt& prompt);
  /// The same of all sequences that there have been: the longest that the pool has.
  int64_t adopt(Sequence& sequence, const Prompt& prompt);

  /// Lets the cells of `prompt` behind the sequence's own wait. embeddings[i]: image i's, or nullptr for one
  /// that lies wholly in what has been computed.
  void begin(Sequence& sequence, const Prompt& prompt,
             std::span<const std::shared_ptr<const Embeddings>> embeddings) const;
  /// Lets one more text token wait; where it has been guessed, its cell is there already, and its logits are
  /// those that count. Throws std::invalid_argument where it cannot follow: require_pushable.
  void push(Sequence& sequence, int32_t token);
  void require_pushable(const Sequence& sequence, int32_t token) const;

  /// Whether rows that are only likely to be wanted cost less than steps of their own.
  bool can_guess() const { return !backend().keeps_logits(); }
  /// Text tokens that are likely to follow a drawn one, whose cell waits; instead of earlier guesses. Returns
  /// how many are taken: those that fit into its page, so that no memory is needed for what may not count.
  /// Throws std::invalid_argument where none can follow.
  int64_t guess(Sequence& sequence, std::span<const int32_t> tokens) const;

  /// Computes the rows of every sequence, none twice, backend().max_batch_rows() at most in all, guesses
  /// included. OutOfPages, or an exception of `progress`, leaves every sequence as it was.
  void step(std::span<const StepRows> batch, const Progress& progress);
  /// All cells that wait, in as many steps as they take. `all_logits` as of StepRows.
  void evaluate(Sequence& sequence, const Progress& progress, float* all_logits = nullptr);

  /// [vocab_size] after the last cell that counts; empty where it has not been computed.
  std::span<const float> logits(Sequence& sequence);
  /// `allowed` [vocab_size]: 0 for tokens that must not be drawn; empty: all may.
  int32_t sample(Sequence& sequence, Sampler& sampler, std::span<const uint8_t> allowed = {});
  /// Of a token, and the `top` likeliest, after the last cell.
  LogProbabilities log_probabilities(Sequence& sequence, int32_t token, size_t top);

  /// Gives the pages back, now or after the call that is being made. Never waits: sequences end where Python
  /// drops them, and a call may be waiting for Python.
  void abandon(Sequence&& sequence) noexcept;

 private:
  void require_batch(std::span<const StepRows> batch) const;
  void require_token(int32_t token) const;
  void compute(Backend& backend, std::span<const StepRows> batch, const Progress& progress);
  void fetch(Backend& backend, Logits& logits) const;
  void give_back_abandoned() noexcept;

  ModelConfig config_;
  Precision precision_;
  ChosenBackend chosen_;
  std::unique_ptr<PagePool> pool_;
  CallLock call_lock_;
  std::atomic<int64_t> cache_bytes_{0};
  std::mutex abandoned_mutex_;
  std::vector<PageTable> abandoned_;

  // Of the step at work, [row] and [page] of all its sequences.
  std::vector<const float*> embeddings_;
  std::vector<PageHandle> pages_;
  std::shared_ptr<std::vector<float>> logits_;  ///< [sequence][vocab_size]; anew where one still has its row
  std::vector<std::weak_ptr<Logits>> kept_;     ///< that the last step has left with the backend
};

}  // namespace qwen2vl
