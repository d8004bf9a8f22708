#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "engine/page_pool.h"

namespace qwen2vl {
namespace {

using Cells = std::vector<CellKey>;

constexpr int64_t kCells = 4, kBytes = 10;  // of a page

/// Pages that hold the cells themselves, so that a page in the wrong place shows.
class FakeStore final : public PageStore {
 public:
  int64_t page_cells() const override { return kCells; }
  int64_t page_bytes() const override { return kBytes; }
  PageHandle make() override {
    if (static_cast<int64_t>(live.size()) >= room) throw DeviceError("no room");
    auto* page = new Cells(kCells, CellKey{-1});
    live.insert(page);
    return page;
  }
  void free(PageHandle page) noexcept override {
    CHECK(live.erase(static_cast<Cells*>(page)) == 1);
    delete static_cast<Cells*>(page);
  }
  void copy(PageHandle from, PageHandle to) override {
    *static_cast<Cells*>(to) = *static_cast<Cells*>(from);
    ++copied;
  }

  std::set<Cells*> live;
  int64_t copied = 0, room = 1000;  // pages
};

CellKey cell(int32_t token) { return {token}; }

Cells cells_of(std::initializer_list<int32_t> tokens) {
  Cells cells;
  for (const int32_t token : tokens) cells.push_back(cell(token));
  return cells;
}

/// What a sequence does: room first, then the computation, then its commit.
void compute(PagePool& pool, PageTable& table, const Cells& cells) {
  pool.reserve(table, std::ssize(cells));
  for (int64_t i = 0; i < std::ssize(cells); ++i) {
    const int64_t at = table.size + i;
    static_cast<Cells*>(table.pages[at / kCells]->handle)->at(at % kCells) = cells[i];
  }
  pool.commit(table, cells);
}

Cells stored(const PageTable& table) {
  Cells found;
  for (int64_t at = 0; at < table.size; ++at)
    found.push_back(static_cast<Cells*>(table.pages.at(at / kCells)->handle)->at(at % kCells));
  return found;
}

TEST_CASE("full pages are shared, part-filled ones copied when they are written to") {
  FakeStore store;
  PagePool pool(store, 100 * kBytes);
  const Cells prompt = cells_of({1, 2, 3, 4, 5, 6});
  PageTable first;
  compute(pool, first, prompt);

  PageTable second = pool.find(cells_of({1, 2, 3, 4, 5, 6, 7}));
  CHECK(second.size == 6);
  CHECK(second.pages == first.pages);
  compute(pool, second, cells_of({7}));
  CHECK(store.copied == 1);
  CHECK(second.pages[0] == first.pages[0]);
  CHECK(second.pages[1] != first.pages[1]);

  compute(pool, first, cells_of({8, 9}));  // its page again: no copy
  CHECK(store.copied == 1);
  CHECK(stored(first) == cells_of({1, 2, 3, 4, 5, 6, 8, 9}));
  CHECK(stored(second) == cells_of({1, 2, 3, 4, 5, 6, 7}));

  PageTable third = pool.find(cells_of({1, 2, 3, 0}));  // inside a page that is full
  CHECK(third.size == 3);
  compute(pool, third, cells_of({0}));
  CHECK(stored(third) == cells_of({1, 2, 3, 0}));
  CHECK(stored(first) == cells_of({1, 2, 3, 4, 5, 6, 8, 9}));
  CHECK(pool.page_count() == 4);
  CHECK(pool.find(cells_of({2, 2, 3, 4})).size == 0);
}

TEST_CASE("a cell is its token, its image, its place in it, its adapter, and all before it") {
  FakeStore store;
  PagePool pool(store, 100 * kBytes);
  CellKey patch{9, 3, 0, {1, 4, 4}, {}};
  patch.image[15] = 1;
  Cells prompt = cells_of({1, 1, 1, 1, 1});
  prompt.back() = patch;
  PageTable table;
  compute(pool, table, prompt);
  const auto found = [&](const Cells& cells) {
    PageTable other = pool.find(cells);
    const int64_t size = other.size;
    pool.release(other);
    return size;
  };
  CHECK(found(prompt) == 5);
  const auto changed = [&](auto&& change) {
    Cells other = prompt;
    change(other);
    return found(other);
  };
  CHECK(changed([](Cells& c) { c[4].image[0] = 1; }) == 4);
  CHECK(changed([](Cells& c) { c[4].image[15] = 2; }) == 4);
  CHECK(changed([](Cells& c) { c[4].patch = 2; }) == 4);
  CHECK(changed([](Cells& c) { c[4].grid.w = 8; }) == 4);
  CHECK(changed([](Cells& c) { c[4].token = 8; }) == 4);
  CHECK(changed([](Cells& c) { c[0].adapter = 1; }) == 0);
  CHECK(changed([](Cells& c) { c[2].adapter = 1; }) == 2);
  CHECK(found(cells_of({1, 1, 1, 1, 1, 1, 1, 1})) == 4);  // not the first page in the second's place
}

TEST_CASE("the longest unused page goes first, and never before one that is found through it") {
  FakeStore store;
  PagePool pool(store, 4 * kBytes);
  PageTable old, recent;
  compute(pool, old, cells_of({1, 1, 1, 1, 2, 2, 2, 2}));
  compute(pool, recent, cells_of({3, 3, 3, 3}));
  pool.release(old);
  pool.release(recent);
  PageTable used = pool.find(cells_of({1, 1, 1, 1}));  // the first page of `old` is the last used now
  pool.release(used);
  CHECK(pool.idle_pages() == 3);

  PageTable table;
  compute(pool, table, cells_of({5, 5, 5, 5, 6, 6, 6, 6}));
  CHECK(store.live.size() == 4);
  CHECK(pool.find(cells_of({1, 1, 1, 1, 2, 2, 2, 2})).size == 4);
  CHECK(pool.find(cells_of({3, 3, 3, 3})).size == 4);
}

TEST_CASE("running out leaves every table as it was, and room comes back") {
  FakeStore store;
  PagePool pool(store, 3 * kBytes);
  PageTable first, second;
  compute(pool, first, cells_of({1, 2, 3, 4, 5}));
  compute(pool, second, cells_of({6}));
  CHECK_THROWS_AS(pool.reserve(second, 4), OutOfPages);
  CHECK(stored(first) == cells_of({1, 2, 3, 4, 5}));
  CHECK(stored(second) == cells_of({6}));
  CHECK_NOTHROW(compute(pool, second, cells_of({7, 8, 9})));
  PageTable third = pool.find(cells_of({1, 2, 3, 4, 5, 6}));
  CHECK_THROWS_AS(pool.reserve(third, 1), OutOfPages);  // a copy would be the fourth
  pool.release(second);
  CHECK_NOTHROW(compute(pool, third, cells_of({6})));
  CHECK(stored(third) == cells_of({1, 2, 3, 4, 5, 6}));
  CHECK(stored(first) == cells_of({1, 2, 3, 4, 5}));
  CHECK_THROWS_AS(pool.truncate(first, 6), std::invalid_argument);
}

TEST_CASE("what is given back before it was computed is not kept") {
  FakeStore store;
  PagePool pool(store, 10 * kBytes);
  PageTable table;
  pool.reserve(table, 9);
  CHECK(pool.page_count() == 3);
  pool.release(table);
  CHECK(store.live.empty());
}

TEST_CASE("what is forgotten is not found, and tables keep what they have") {
  FakeStore store;
  PagePool pool(store, 10 * kBytes);
  PageTable kept, idle;
  compute(pool, kept, cells_of({1, 2, 3, 4, 5}));
  compute(pool, idle, cells_of({7, 7}));
  pool.release(idle);
  pool.forget();
  CHECK(pool.page_count() == 2);
  CHECK(pool.find(cells_of({1, 2, 3, 4, 5})).size == 0);
  compute(pool, kept, cells_of({6, 7, 8, 9}));
  CHECK(stored(kept) == cells_of({1, 2, 3, 4, 5, 6, 7, 8, 9}));
}

TEST_CASE("where the store has less room than the budget, pages without users make some") {
  FakeStore store;
  store.room = 3;
  PagePool pool(store, 10 * kBytes);
  PageTable table, other;
  compute(pool, table, cells_of({1, 2, 3, 4, 5}));
  pool.release(table);
  compute(pool, other, cells_of({6, 6, 6, 6, 6, 6, 6, 6, 6}));
  CHECK(stored(other) == cells_of({6, 6, 6, 6, 6, 6, 6, 6, 6}));
  CHECK(pool.page_count() == 3);
  CHECK_THROWS_AS(pool.reserve(other, 4), DeviceError);
  CHECK(stored(other) == cells_of({6, 6, 6, 6, 6, 6, 6, 6, 6}));
}

TEST_CASE("random work: no page lost or used twice, the budget kept, every cell where it belongs") {
  for (const bool small : {false, true}) {  // the store has less room than the budget
    CAPTURE(small);
    std::mt19937 random(small ? 8 : 7);
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    FakeStore store;
    if (small) store.room = 20;
    constexpr int64_t kPages = 24;
    PagePool pool(store, kPages * kBytes);
    struct Alive {
      PageTable table;
      Cells cells;
    };
    std::vector<Alive> alive;
    int64_t found = 0, out = 0;
    for (int step = 0; step < 20000; ++step) {
      const int what = below(20);
      Alive* some = alive.empty() ? nullptr : &alive[below(static_cast<int>(alive.size()))];
      if (what < 6 && alive.size() < 8) {
        Cells prompt;
        for (int n = 1 + below(20); n > 0; --n) prompt.push_back(cell(below(2)));
        PageTable table = pool.find(prompt);
        REQUIRE(table.size <= std::ssize(prompt));
        prompt.resize(table.size);
        found += table.size;
        alive.push_back({std::move(table), prompt});
      } else if (what < 15 && some != nullptr) {
        Cells more;
        for (int n = 1 + below(9); n > 0; --n) more.push_back(cell(below(2)));
        try {
          compute(pool, some->table, more);
          some->cells.insert(some->cells.end(), more.begin(), more.end());
        } catch (const Error&) {
          ++out;
        }
      } else if (what < 16 && some != nullptr) {
        const int64_t size = below(static_cast<int>(some->cells.size()) + 1);
        pool.truncate(some->table, size);
        some->cells.resize(size);
      } else if (what < 19 && some != nullptr) {
        pool.release(some->table);
        std::swap(*some, alive.back());
        alive.pop_back();
      } else if (below(50) == 0) {
        pool.forget();
      }

      std::map<const CachedPage*, int64_t> users;
      for (const Alive& a : alive) {
        REQUIRE(a.table.size == std::ssize(a.cells));
        REQUIRE(stored(a.table) == a.cells);
        for (const CachedPage* page : a.table.pages) ++users[page];
      }
      for (const auto& [page, n] : users) REQUIRE(page->users == n);
      REQUIRE(pool.page_count() == std::ssize(store.live));
      REQUIRE(pool.page_count() == pool.idle_pages() + std::ssize(users));
      REQUIRE(pool.bytes() <= kPages * kBytes);
    }
    CHECK(found > 1000);
    CHECK(out > 10);
    for (Alive& a : alive) pool.release(a.table);
    CHECK(pool.idle_pages() == pool.page_count());
    pool.forget();
    CHECK(store.live.empty());
  }
}

}  // namespace
}  // namespace qwen2vl
