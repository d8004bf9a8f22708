#include "engine/page_pool.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

namespace qwen2vl {
namespace {

/// Where a page is looked up: SplitMix64's finalizer over the id of the page before it and its first cell.
/// Pages are compared cell by cell, so equal links cost time alone.
uint64_t link(uint64_t before, const CellKey& first) {
  std::array<uint64_t, 2> image;
  static_assert(sizeof(image) == sizeof(first.image));
  std::memcpy(image.data(), first.image.data(), sizeof(image));
  uint64_t hash = before;
  const auto token = (static_cast<uint64_t>(first.token) << 32) ^ static_cast<uint32_t>(first.patch);
  for (const uint64_t word : {token, image[0], image[1], static_cast<uint64_t>(first.adapter)}) {
    hash = (hash ^ word) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    hash ^= hash >> 31;
  }
  return hash;
}

}  // namespace

PagePool::PagePool(PageStore& store, int64_t budget)
    : store_(store), budget_(budget), page_cells_(store.page_cells()) {}

PagePool::~PagePool() {
  for (const auto& [page, owner] : pages_) store_.free(page->handle);
}

int64_t PagePool::bytes() const { return page_count() * store_.page_bytes(); }

PageTable PagePool::find(std::span<const CellKey> cells) {
  PageTable table;
  uint64_t before = root_;
  while (!cells.empty()) {
    int64_t common = 0;
    CachedPage* page = longest(before, cells, common);
    if (page == nullptr) break;
    use(page);
    table.pages.push_back(page);
    table.size += common;
    if (common < page_cells_) break;
    before = page->id;
    cells = cells.subspan(common);
  }
  return table;
}

CachedPage* PagePool::longest(uint64_t before, std::span<const CellKey> cells, int64_t& common) {
  CachedPage* best = nullptr;
  const auto [begin, end] = index_.equal_range(link(before, cells[0]));
  for (auto it = begin; it != end; ++it) {
    CachedPage* page = it->second;
    if (page->before != before) continue;
    const auto differ = std::mismatch(page->cells.begin(), page->cells.end(), cells.begin(), cells.end());
    const int64_t n = differ.first - page->cells.begin();
    if (n > common) {
      common = n;
      best = page;
    }
  }
  return best;
}

void PagePool::reserve(PageTable& table, int64_t cells) {
  make_writable(table);
  const int64_t pages = (table.size + cells + page_cells_ - 1) / page_cells_;
  while (static_cast<int64_t>(table.pages.size()) < pages) table.pages.push_back(make_page());
}

/// The part of the last page that is not the table's must be nobody's.
void PagePool::make_writable(PageTable& table) {
  const int64_t used = table.size % page_cells_;
  if (used == 0) return;
  CachedPage*& last = table.pages[table.size / page_cells_];
  if (last->users == 1 && static_cast<int64_t>(last->cells.size()) == used) return;
  CachedPage* own = nullptr;
  try {
    own = make_page();
  } catch (const Error&) {
    if (last->users > 1) throw;
  }
  if (own == nullptr) {  // its other cells go; what was computed behind them is no longer found
    last->cells.resize(used);
    last->id = ++last_id_;
    return;
  }
  store_.copy(last->handle, own->handle);
  own->cells.assign(last->cells.begin(), last->cells.begin() + used);
  add_to_index(own, last->before);
  leave(std::exchange(last, own));
}

CachedPage* PagePool::make_page() {
  while (bytes() + store_.page_bytes() > budget_) {
    if (!drop_oldest())
      throw OutOfPages("the KV cache is full: expected " + std::to_string(store_.page_bytes()) +
                       " bytes for more cells, found " + std::to_string(bytes()) + " of " +
                       std::to_string(budget_) + " in use by sequences");
  }
  auto owner = std::make_unique<CachedPage>();
  CachedPage* page = owner.get();
  pages_.emplace(page, std::move(owner));
  while (page->handle == nullptr) try {
      page->handle = store_.make();
    } catch (...) {  // a device may have less room than the budget
      if (drop_oldest()) continue;
      pages_.erase(page);
      throw;
    }
  page->id = ++last_id_;
  page->users = 1;
  return page;
}

/// Of the pages without users; false where there is none.
bool PagePool::drop_oldest() {
  if (idle_.empty()) return false;
  CachedPage* oldest = idle_.front();
  idle_.pop_front();
  destroy(oldest);
  return true;
}

void PagePool::commit(PageTable& table, std::span<const CellKey> cells) {
  while (!cells.empty()) {
    const int64_t index = table.size / page_cells_, used = table.size % page_cells_;
    CachedPage* page = table.pages.at(index);
    const auto n = static_cast<size_t>(std::min<int64_t>(page_cells_ - used, std::ssize(cells)));
    page->cells.insert(page->cells.end(), cells.begin(), cells.begin() + static_cast<std::ptrdiff_t>(n));
    if (used == 0) add_to_index(page, index == 0 ? root_ : table.pages[index - 1]->id);
    table.size += static_cast<int64_t>(n);
    cells = cells.subspan(n);
  }
}

void PagePool::truncate(PageTable& table, int64_t size) {
  if (size < 0 || size > table.size)
    throw std::invalid_argument("cannot truncate a sequence to more cells than it has");
  table.size = size;
  const size_t keep = static_cast<size_t>((size + page_cells_ - 1) / page_cells_);
  // The last first: a page goes before the one that it is found by.
  while (table.pages.size() > keep) {
    leave(table.pages.back());
    table.pages.pop_back();
  }
}

void PagePool::forget() {
  root_ = ++last_id_;
  for (CachedPage* page : std::exchange(idle_, {})) destroy(page);
}

void PagePool::use(CachedPage* page) {
  if (page->users++ == 0) idle_.erase(page->idle);
}

void PagePool::leave(CachedPage* page) {
  if (--page->users > 0) return;
  if (page->cells.empty())
    destroy(page);
  else
    page->idle = idle_.insert(idle_.end(), page);
}

void PagePool::add_to_index(CachedPage* page, uint64_t before) {
  page->before = before;
  index_.emplace(link(before, page->cells[0]), page);
}

void PagePool::remove_from_index(CachedPage* page) {
  if (page->cells.empty()) return;
  const auto [begin, end] = index_.equal_range(link(page->before, page->cells[0]));
  index_.erase(std::find_if(begin, end, [&](const auto& entry) { return entry.second == page; }));
}

void PagePool::destroy(CachedPage* page) {
  remove_from_index(page);
  store_.free(page->handle);
  pages_.erase(page);
}

}  // namespace qwen2vl
