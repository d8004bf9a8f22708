#include "base/printable.h"

#include <cstdint>

namespace qwen2vl {
namespace {

struct Character {
  uint32_t code;
  size_t bytes;
  bool valid;  // else `code` is a byte that is not UTF-8
};

/// The first character of `text`, which is not empty (RFC 3629: no overlong forms, no surrogates).
Character first_character(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true};
  const size_t bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  constexpr uint32_t kLowest[] = {0, 0, 0x80, 0x800, 0x10000};
  uint32_t code = lead & (0x7fu >> bytes);
  bool valid = lead >= 0xc2 && lead <= 0xf4 && bytes <= text.size();
  for (size_t i = 1; valid && i < bytes; ++i) {
    valid = (byte(i) & 0xc0) == 0x80;
    code = code << 6 | (byte(i) & 0x3fu);
  }
  valid = valid && code >= kLowest[bytes] && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
  return valid ? Character{code, bytes, true} : Character{lead, 1, false};
}

bool is_unprintable(uint32_t code) {
  return code < 0x20 || (code >= 0x7f && code <= 0x9f) || (code >= 0x200b && code <= 0x200f) ||
         (code >= 0x2028 && code <= 0x202e) || (code >= 0x2060 && code <= 0x206f) || code == 0xfeff;
}

std::string escaped(uint32_t code) {
  switch (code) {
    case '\t':
      return "\\t";
    case '\n':
      return "\\n";
    case '\r':
      return "\\r";
  }
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = code < 0x100 ? "\\x" : "\\u";
  for (int shift = code < 0x100 ? 4 : 12; shift >= 0; shift -= 4) out += kHex[code >> shift & 15];
  return out;
}

}  // namespace

std::string printable(std::string_view text, size_t limit) {
  std::string out;
  size_t characters = 0;
  for (; !text.empty(); ++characters) {
    const Character c = first_character(text);
    if (characters < limit) {
      if (c.valid && !is_unprintable(c.code))
        out += text.substr(0, c.bytes);
      else
        out += escaped(c.code);
    }
    text.remove_prefix(c.bytes);
  }
  if (characters > limit) out += "... (" + std::to_string(characters) + " in all)";
  return out;
}

std::string printable_path(const std::filesystem::path& path) {
  constexpr size_t kLongest = 4096;   // Linux' PATH_MAX
  const auto text = path.u8string();  // the system's own bytes on POSIX
  return printable({reinterpret_cast<const char*>(text.data()), text.size()}, kLongest);
}

}  // namespace qwen2vl
