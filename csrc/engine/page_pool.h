#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "model/page_store.h"
#include "model/positions.h"

namespace qwen2vl {

/// What a cell of the cache holds: a text token, or one merged patch of an image or video.
struct CellKey {
  int32_t token = 0;
  int32_t patch = 0;    ///< index within the image or video; 0 for text
  int32_t adapter = 0;  ///< with which the weights were used; 0: none
  GridTHW grid{0, 0, 0};
  std::array<uint8_t, 16> image{};  ///< identifies its pixels; zero for text
  bool operator==(const CellKey&) const = default;
};

/// All pages that the budget allows belong to sequences.
class OutOfPages : public Error {
 public:
  using Error::Error;
};

/// One page with what is known of it. A page that has cells is found by its first one and the page before it;
/// since that page is known by its own contents, the chain says all that a cell depends on.
struct CachedPage {
  PageHandle handle = nullptr;
  std::vector<CellKey> cells;  ///< those computed: the page is full, or its one user may go on with it
  uint64_t id = 0;             ///< of these contents; never used again for others
  uint64_t before = 0;         ///< id of the page before it; of a first page the pool's root
  int64_t users = 0;           ///< tables that it stands in
  std::list<CachedPage*>::iterator idle{};  ///< its place among those without users
};

/// The pages of one sequence: the first `size` cells have been computed.
struct PageTable {
  std::vector<CachedPage*> pages;
  int64_t size = 0;
};

/// Every page of a model's sequences. Full pages are shared, part-filled ones copied when a second sequence
/// writes to them. Pages without users stay to be found again until their memory is needed: the longest
/// unused go first. Not thread-safe.
class PagePool {
 public:
  /// `budget`: bytes of all pages at most.
  PagePool(PageStore& store, int64_t budget);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  void set_budget(int64_t bytes) { budget_ = bytes; }
  int64_t bytes() const;
  int64_t idle_pages() const { return static_cast<int64_t>(idle_.size()); }
  int64_t page_count() const { return static_cast<int64_t>(pages_.size()); }

  /// The longest beginning of `cells` that has been computed, as a table of its own.
  PageTable find(std::span<const CellKey> cells);

  /// Makes room for `cells` cells behind the table's, which nobody else sees. OutOfPages leaves the table as
  /// good as it was.
  void reserve(PageTable& table, int64_t cells);
  /// The cells behind the table's, for which there is room, have been computed.
  void commit(PageTable& table, std::span<const CellKey> cells);

  /// Gives back the pages behind the first `size` cells.
  void truncate(PageTable& table, int64_t size);
  void release(PageTable& table) { truncate(table, 0); }

  /// Nothing computed so far will be found again. Tables keep their pages.
  void forget();

 private:
  CachedPage* longest(uint64_t before, std::span<const CellKey> cells, int64_t& common);
  CachedPage* make_page();
  bool drop_oldest();
  void make_writable(PageTable& table);
  void use(CachedPage* page);
  void leave(CachedPage* page);
  void add_to_index(CachedPage* page, uint64_t before);
  void remove_from_index(CachedPage* page);
  void destroy(CachedPage* page);

  PageStore& store_;
  int64_t budget_;
  int64_t page_cells_;
  uint64_t last_id_ = 0, root_ = 0;
  std::unordered_map<CachedPage*, std::unique_ptr<CachedPage>> pages_;
  std::unordered_multimap<uint64_t, CachedPage*> index_;  ///< by link()
  std::list<CachedPage*> idle_;                           ///< the longest unused first
};

}  // namespace qwen2vl
