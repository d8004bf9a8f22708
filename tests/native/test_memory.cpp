#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "base/aligned_buffer.h"
#include "base/error.h"
#include "base/mapped_file.h"
#include "temporary_folder.h"

using namespace qwen2vl;

TEST_CASE("buffers are aligned, writable to the end, and move") {
  constexpr size_t kHuge = size_t{2} << 20;
  for (const size_t bytes : {size_t{1}, size_t{64}, size_t{100}, kHuge - 1, kHuge, 2 * kHuge + 12345}) {
    CAPTURE(bytes);
    AlignedBuffer buffer(bytes);
    REQUIRE(buffer.size() == bytes);
    CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % (bytes < kHuge ? 64 : kHuge) == 0);
    buffer.data()[0] = 1;
    buffer.data()[bytes - 1] = 2;
    uint8_t* data = buffer.data();
    AlignedBuffer moved(std::move(buffer));
    CHECK(moved.data() == data);
    CHECK(buffer.data() == nullptr);
    AlignedBuffer assigned;
    assigned = std::move(moved);
    CHECK(assigned.data() == data);
    CHECK(assigned.size() == bytes);
    CHECK(assigned.data()[bytes - 1] == 2);
  }
  CHECK(AlignedBuffer(0).data() == nullptr);
  CHECK_THROWS_AS(AlignedBuffer(std::numeric_limits<size_t>::max()), std::bad_alloc);
  CHECK_THROWS_AS(AlignedBuffer(std::numeric_limits<size_t>::max() / 2), std::bad_alloc);
}

TEST_CASE("a mapped file shows its bytes, also after their pages were given back") {
  const TemporaryFolder folder;
  std::string content(300'000, '\0');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 2654435761u >> 24);
  const MappedFile file(folder.write("data", content));
  const auto same = [&] {
    return std::string(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()) == content;
  };
  CHECK(same());
  file.release(0, content.size());
  file.release(5000, 100'000);
  file.release(content.size() + 1, 7);
  file.release(1, std::numeric_limits<size_t>::max());
  CHECK(same());
}

TEST_CASE("files that cannot be mapped") {
  const TemporaryFolder folder;
  CHECK(MappedFile(folder.write("empty", "")).bytes().empty());
  CHECK_THROWS_AS(MappedFile(folder.path() + "/missing"), Error);
  CHECK_THROWS_AS(MappedFile(folder.path()), Error);
}
