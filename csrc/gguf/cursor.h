#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/error.h"
#include "base/input_file.h"
#include "base/printable.h"

namespace qwen2vl::gguf {

/// `text` in quotes for a message.
inline std::string in_quotes(std::string_view text) {
  return std::string("'").append(printable(text)).append("'");
}

/// Walks through a file's header. Every read is checked against the bytes left; what fails is a FormatError
/// that names the file, the entry being read and its place.
class Cursor {
 public:
  /// What is read is kept in `chunks`, and strings are views of it.
  Cursor(const InputFile& file, std::vector<std::vector<uint8_t>>& chunks) : file_(file), chunks_(chunks) {}

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return file_.size() - position_; }

  /// What the next reads are about ("key 'x'"), for messages.
  void enter(std::string entry) { entry_ = std::move(entry); }

  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << file_.name() << ": " << entry_ << ": ";
    (message << ... << parts);
    throw FormatError(message.str());
  }

  /// Fails unless `count` items of at least `item_bytes` each can still follow. `what` names them.
  void need(uint64_t count, uint64_t item_bytes, std::string_view what) const {
    if (count <= remaining() / item_bytes) return;
    fail("expected ", count, " ", what, " at offset ", position_, ", found only ", remaining(),
         " bytes to the end of the file");
  }

  /// A number; bool (one byte, 0 or 1); or a string: its length (64 bit) and a view of its bytes.
  template <typename T>
  T get() {
    if constexpr (std::is_same_v<T, std::string_view>) {
      const auto length = get<uint64_t>();
      need(length, 1, "bytes of a string");
      return {reinterpret_cast<const char*>(take(length)), static_cast<size_t>(length)};
    } else if constexpr (std::is_same_v<T, bool>) {
      const auto value = get<uint8_t>();
      if (value > 1) fail("expected a bool (0 or 1) at offset ", position_ - 1, ", found ", int{value});
      return value == 1;
    } else {
      need(1, sizeof(T), sizeof(T) == 1 ? "byte" : "number");
      T value;
      std::memcpy(&value, take(sizeof value), sizeof value);
      return value;
    }
  }

 private:
  // A vocabulary's keys take some six megabytes; what is far above is an attack on memory.
  static constexpr uint64_t kMostBytes = uint64_t{1} << 28;
  static constexpr uint64_t kChunk = uint64_t{1} << 18;

  /// The next `bytes`, which the file has, in one piece.
  const uint8_t* take(uint64_t bytes) {
    if (bytes > ahead_.size()) {
      if (position_ + bytes > kMostBytes)
        fail("expected all keys and tensor entries in the first ", kMostBytes, " bytes of the file");
      std::vector<uint8_t>& chunk = chunks_.emplace_back(std::min(std::max(bytes, kChunk), remaining()));
      file_.read(position_, chunk);
      ahead_ = chunk;
    }
    const uint8_t* taken = ahead_.data();
    ahead_ = ahead_.subspan(bytes);
    position_ += bytes;
    return taken;
  }

  const InputFile& file_;
  std::vector<std::vector<uint8_t>>& chunks_;
  std::span<const uint8_t> ahead_;  // of the last chunk, from position_ on
  uint64_t position_ = 0;
  std::string entry_ = "header";
};

}  // namespace qwen2vl::gguf
