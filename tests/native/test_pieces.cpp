#include <doctest/doctest.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>

#include "base/pieces.h"

using namespace qwen2vl;

namespace {

/// Adds to `sum` in `n` pieces, the last of them after its last stop; throws in piece `fails`.
Pieces add(std::shared_ptr<int> sum, int n, int fails = -1) {
  for (int i = 0; i < n; ++i) {
    if (i == fails) throw std::runtime_error("piece");
    ++*sum;
    if (i + 1 < n) co_yield 10 * i;
  }
}

}  // namespace

TEST_CASE("pieces come one at a time") {
  const auto sum = std::make_shared<int>(0);
  Pieces work = add(sum, 3);
  CHECK(*sum == 0);
  CHECK(work.next());
  CHECK(*sum == 1);
  CHECK(work.done() == 0);
  Pieces moved = std::move(work);
  CHECK(moved.next());
  CHECK(moved.done() == 10);
  CHECK_FALSE(moved.next());
  CHECK(*sum == 3);
  CHECK(sum.use_count() == 2);
  CHECK_FALSE(moved.next());
  CHECK(*sum == 3);
}

TEST_CASE("what is dropped lets go of what it holds") {
  const auto sum = std::make_shared<int>(0);
  {
    std::optional<Pieces> begun(add(sum, 3)), fresh(add(sum, 3));
    CHECK(begun->next());
    CHECK(sum.use_count() == 3);
  }
  CHECK(sum.use_count() == 1);
  CHECK(*sum == 1);
}

TEST_CASE("an exception ends the work") {
  const auto sum = std::make_shared<int>(0);
  Pieces work = add(sum, 3, 1);
  CHECK(work.next());
  CHECK_THROWS_WITH_AS(work.next(), "piece", std::runtime_error);
  CHECK_THROWS_AS(work.next(), std::logic_error);
  CHECK(*sum == 1);
}
