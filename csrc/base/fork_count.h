#pragma once

#include <cstdint>

namespace qwen2vl {

/// How many forks lie between the process that loaded this library and this one: a change tells that all
/// threads but one have stayed behind. As cheap as reading a variable; always 0 where there is no fork.
uint32_t fork_count();

}  // namespace qwen2vl
