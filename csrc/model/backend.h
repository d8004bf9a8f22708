#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "model/page_store.h"
#include "model/positions.h"
#include "model/profile.h"

namespace qwen2vl {

/// "Fast" may quantize activations to 8 bits per block and keeps the KV cache in f16; "exact" computes on
/// float32 activations and a float32 cache throughout, for verification.
enum class Precision { Fast, Exact };

/// Called between layers with (done, total) on the calling thread. An exception thrown in it cancels the
/// call; the cells before its rows stay as they were.
using Progress = std::function<void(int64_t done, int64_t total)>;

enum class LogitsWanted { None, Last, All };

/// Consecutive rows of one sequence.
struct SequenceRows {
  std::span<const PageHandle> pages;  ///< of all its cells, those of the rows included
  int64_t first_cell = 0;             ///< of the rows: so many cells have been computed
  std::span<const int32_t> token_ids;
  /// Per row the embedding [hidden_size] that stands in for the token's own (a vision cell), or nullptr.
  std::span<const float* const> embeddings;
  std::span<const Position> positions;
  LogitsWanted logits = LogitsWanted::None;
  /// Whether the tokens have been drawn, one at a time, and are no part of a prompt. What becomes of a row
  /// depends on this and its sequence alone, not on what else is in the batch nor on how a prompt is cut.
  bool decoded = false;
};

/// What the vision tower looks at: patches, or a still's pixels where there are none.
struct VisionInput {
  GridTHW grid;
  const float* pixel_values = nullptr;  ///< [t*h*w, patch_dim]
  const uint8_t* pixels = nullptr;      ///< [h * patch_size, w * patch_size, in_channels]
  const float* levels = nullptr;  ///< what a byte of each channel of `pixels` becomes [in_channels, 256]
};

/// An image or video on its way through the tower, of one backend; calls of it are calls of the backend.
class VisionPass {
 public:
  virtual ~VisionPass() = default;
  /// Goes on for about so many seconds, with one piece of work at least; true once the rows are there. A
  /// backend whose pieces are whole passes takes the time of one. An exception of `progress` stops it between
  /// two pieces: it can go on.
  virtual bool advance(double seconds, const Progress& progress) = 0;
};

/// What benchmarks ask of a backend; calls of it are calls of the backend.
class Instruments {
 public:
  virtual ~Instruments() = default;
  /// Times the stages of the forward passes from the one to the other.
  virtual void start_profile() = 0;
  virtual std::vector<StageRecord> stop_profile() = 0;
  /// Reads all weights that decoding a token reads, and does nothing with them: what a token waits for at
  /// least. Returns their bytes.
  virtual int64_t read_weights() = 0;
};

/// The two forward passes on one kind of device. One call at a time, const ones excepted.
class Backend {
 public:
  virtual ~Backend() = default;

  /// The memory of the pages that forward takes.
  virtual PageStore& pages() = 0;

  /// Begins to compute the rows of an image or video, out [t*h*w / merge^2, hidden_size], which `input` and
  /// `out` outlive. Passes may be under way beside each other and beside calls of forward: the bits are the
  /// same.
  virtual std::unique_ptr<VisionPass> begin_vision(const VisionInput& input, float* out) = 0;

  /// Computes the rows of every sequence and fills their cells; writes the logits wanted, [rows, vocab_size],
  /// sequence after sequence. A backend that keeps logits may be given none to write to unless all rows' are
  /// wanted: then they stay on the device until the next call.
  virtual void forward(std::span<const SequenceRows> batch, float* logits, const Progress& progress) = 0;

  /// Where a backend keeps logits: row `row` of them [vocab_size], or the first of its largest, -1 where none
  /// is a number. Whoever asks for the likeliest is likely to append it next.
  virtual bool keeps_logits() const { return false; }
  virtual void kept_logits(int64_t /*row*/, float* /*out*/) {
    throw std::logic_error("this backend keeps no logits");
  }
  virtual int32_t likeliest(int64_t /*row*/) { throw std::logic_error("this backend keeps no logits"); }

  /// Rows that forward takes in one call at most; longer prompts are cut by the caller.
  virtual int64_t max_batch_rows() const = 0;

  /// For benchmarks; as long as the backend.
  virtual Instruments& instruments() = 0;

  /// Of the weights that have been used so far: the vision tower's count from the first image.
  virtual int64_t weight_bytes() const = 0;
  virtual std::string device() const = 0;
  virtual std::string_view isa() const = 0;        ///< the device's own name where it is not the processor
  virtual int n_threads() const = 0;               ///< of the processor; 0 where they have no part in it
  virtual std::string note() const { return {}; }  ///< a warning to the user, or empty
};

}  // namespace qwen2vl
