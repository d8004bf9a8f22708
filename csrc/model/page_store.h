#pragma once

#include <cstdint>

namespace qwen2vl {

/// The keys and values of some consecutive cells in every layer, as the backend that made it knows it.
using PageHandle = void*;

/// A backend's memory of pages. Calls come one at a time, as the backend's own.
class PageStore {
 public:
  virtual ~PageStore() = default;

  virtual int64_t page_cells() const = 0;
  virtual int64_t page_bytes() const = 0;  ///< of every page

  /// Throws where the memory is not there.
  virtual PageHandle make() = 0;
  virtual void free(PageHandle page) noexcept = 0;
  virtual void copy(PageHandle from, PageHandle to) = 0;
};

}  // namespace qwen2vl
