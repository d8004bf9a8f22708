#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace qwen2vl {

/// What a file, a caller or a library wrote, made fit for one line of a message, as printable.py does it:
/// controls and what reorders or hides text escaped, cut after `limit` characters. Bytes that are not UTF-8
/// become \xNN.
std::string printable(std::string_view text, size_t limit = 120);

/// A path likewise, cut only where no system would open it.
std::string printable_path(const std::filesystem::path& path);

}  // namespace qwen2vl
