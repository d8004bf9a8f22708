#include <doctest/doctest.h>

#include <string>

#include "base/printable.h"

using namespace qwen2vl;

TEST_CASE("controls, and what reorders or hides text, are escaped") {  // as in tests/test_printable.py
  CHECK(printable("plain \u00e9 \u753b \U0001f642 \\") == "plain \u00e9 \u753b \U0001f642 \\");
  CHECK(printable("\x1b[31mred\n\r\t\x7f") == "\\x1b[31mred\\n\\r\\t\\x7f");
  CHECK(printable(std::string_view("a\0b", 3)) == "a\\x00b");
  CHECK(printable("\u009b2J") == "\\x9b2J");
  CHECK(printable("a\u202eb\u200b\u2066\ufeff") == "a\\u202eb\\u200b\\u2066\\ufeff");
}

TEST_CASE("what is not UTF-8 is escaped byte by byte") {
  CHECK(printable("\xff\xfe") == "\\xff\\xfe");
  CHECK(printable("a\xc3") == "a\\xc3");                                    // cut
  CHECK(printable("\xc3(") == "\\xc3(");                                    // no continuation
  CHECK(printable("\xc0\x80\xe0\x80\x80") == "\\xc0\\x80\\xe0\\x80\\x80");  // overlong
  CHECK(printable("\xed\xa0\x80") == "\\xed\\xa0\\x80");                    // half of a surrogate pair
  CHECK(printable("\xf4\x90\x80\x80\xf8") == "\\xf4\\x90\\x80\\x80\\xf8");
  CHECK(printable("\xf4\x8f\xbf\xbf") == "\xf4\x8f\xbf\xbf");
}

TEST_CASE("long texts are cut") {
  CHECK(printable(std::string(1'000'000, 'x'), 5) == "xxxxx... (1000000 in all)");
  CHECK(printable("xxxxx", 5) == "xxxxx");
  CHECK(printable("\u00e9\u00e9\xff", 2) == "\u00e9\u00e9... (3 in all)");  // characters, not bytes
  CHECK(printable("") == "");
}

TEST_CASE("paths keep their ends") {
  const std::string folder(500, 'f');
  CHECK(printable_path(folder + "/m\n.gguf") == folder + "/m\\n.gguf");
}
