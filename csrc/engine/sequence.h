#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/embeddings.h"
#include "engine/page_pool.h"
#include "model/positions.h"

namespace qwen2vl {

/// After the last cell of a sequence, [vocab_size].
struct Logits {
  int64_t kept_row = -1;  ///< where they are with a backend that keeps them, until it computes again
  /// A row of all that a step has computed, which it keeps; null as long as the backend alone has them.
  std::shared_ptr<const float> values;
};

/// A conversation's cells: the first size() have been computed, the others wait for a step of the engine. The
/// last `guessed` are no more than likely to follow: they are computed with those before them, and count when
/// the token that is drawn is theirs.
struct Sequence {
  /// An image or video some of whose cells wait: its first cell, and a row for each.
  struct Item {
    int64_t start;
    std::shared_ptr<const Embeddings> embeddings;
  };
  int64_t n_ctx = 0;         ///< cells at most
  int64_t prompt_cells = 0;  ///< the first; those behind them hold tokens that were drawn
  std::vector<int32_t> token_ids;
  std::vector<CellKey> cells;
  std::vector<Position> positions;
  std::vector<Item> items;
  int32_t next_position = 0;  ///< of a text token after the last cell
  int64_t guessed = 0;
  PageTable table;
  std::vector<std::shared_ptr<Logits>> logits;  ///< after the last cell and each guess; none while cells wait

  int64_t size() const { return table.size; }
  int64_t waiting() const { return static_cast<int64_t>(cells.size()) - guessed - table.size; }

  /// Guesses are none of them.
  std::span<const int32_t> known_tokens() const {
    return std::span(token_ids).first(token_ids.size() - static_cast<size_t>(guessed));
  }

  void append(int32_t token, int32_t position) {
    token_ids.push_back(token);
    cells.push_back({token});
    positions.push_back({position, position, position});
  }
  void drop_logits() { logits.clear(); }
  /// Drops the cells that wait.
  void drop_waiting() { resize(table.size); }
  void resize(int64_t n) {
    token_ids.resize(n);
    cells.resize(n);
    positions.resize(n);
    items.clear();
    guessed = 0;
  }
};

}  // namespace qwen2vl
