#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/error.h"
#include "base/input_file.h"
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
  CHECK_THROWS_AS(AlignedBuffer{std::numeric_limits<size_t>::max()}, std::bad_alloc);
  CHECK_THROWS_AS(AlignedBuffer{std::numeric_limits<size_t>::max() / 2}, std::bad_alloc);
}

namespace {

std::string pattern(size_t bytes) {
  std::string content(bytes, '\0');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 2654435761u >> 24);
  return content;
}

std::string read(const InputFile& file, uint64_t offset, size_t bytes) {
  std::vector<uint8_t> out(bytes);
  file.read(offset, out);
  return {out.begin(), out.end()};
}

}  // namespace

TEST_CASE("a mapped file shows its bytes, also after their pages were given back and its file was closed") {
  const TemporaryFolder folder;
  const std::string content = pattern(300'000);
  auto file = std::make_unique<InputFile>(folder.write("data", content));
  const MappedFile mapped(*file);
  const auto same = [&] {
    return std::string(reinterpret_cast<const char*>(mapped.bytes().data()), mapped.bytes().size()) ==
           content;
  };
  CHECK(same());
  mapped.release();
  CHECK(same());
  file.reset();
  mapped.release();
  CHECK(same());
}

TEST_CASE("a file is read in pieces, and told to have been cut short") {
  const TemporaryFolder folder;
  const std::string content = pattern(300'000);
  const std::string path = folder.write("data", content);
  const InputFile file(path);
  CHECK(file.size() == content.size());
  CHECK(read(file, 0, content.size()) == content);
  CHECK(read(file, 123'456, 7'000) == content.substr(123'456, 7'000));
  CHECK(read(file, content.size(), 0).empty());
  CHECK_THROWS_AS(read(file, content.size() - 1, 2), Error);
  file.require_unchanged();
#ifndef _WIN32
  std::filesystem::resize_file(path, 200'000);
  CHECK(read(file, 0, 200'000) == content.substr(0, 200'000));
  CHECK_THROWS_WITH_AS(read(file, 199'999, 2),
                       (path + ": the file has been changed since it was opened").c_str(), Error);
  CHECK_THROWS_AS(file.require_unchanged(), Error);
#endif
}

TEST_CASE("files that cannot be opened") {
  const TemporaryFolder folder;
  const InputFile empty(folder.write("empty", ""));
  CHECK(empty.size() == 0);
  CHECK(MappedFile(empty).bytes().empty());
  CHECK_THROWS_AS(InputFile(folder.path() + "/missing"), Error);
  CHECK_THROWS_AS(InputFile{folder.path()}, Error);
}
