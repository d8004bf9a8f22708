#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>

#include "base/error.h"

namespace qwen2vl::gguf {

/// `text` in quotes for a message: bytes that are not printable ASCII as \xNN, cut after 64.
inline std::string quoted(std::string_view text) {
  constexpr size_t kShown = 64;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, kShown)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out + (text.size() > kShown ? "'..." : "'");
}

/// Walks through a file's header. Every read is checked against the bytes left; what fails is a FormatError
/// that names the file, the entry being read and its place.
class Cursor {
 public:
  Cursor(const std::string& path, std::span<const uint8_t> bytes) : path_(path), bytes_(bytes) {}

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return bytes_.size() - position_; }

  /// What the next reads are about ("key 'x'"), for messages.
  void enter(std::string entry) { entry_ = std::move(entry); }

  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << path_ << ": " << entry_ << ": ";
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
      const auto* begin = reinterpret_cast<const char*>(bytes_.data()) + position_;
      position_ += length;
      return {begin, static_cast<size_t>(length)};
    } else if constexpr (std::is_same_v<T, bool>) {
      const auto value = get<uint8_t>();
      if (value > 1) fail("expected a bool (0 or 1) at offset ", position_ - 1, ", found ", int{value});
      return value == 1;
    } else {
      need(1, sizeof(T), sizeof(T) == 1 ? "byte" : "number");
      T value;
      std::memcpy(&value, bytes_.data() + position_, sizeof value);
      position_ += sizeof value;
      return value;
    }
  }

 private:
  const std::string& path_;
  std::span<const uint8_t> bytes_;
  uint64_t position_ = 0;
  std::string entry_ = "header";
};

}  // namespace qwen2vl::gguf
