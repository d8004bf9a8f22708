#pragma once

#include <cstdint>

#include "gguf/reader.h"

namespace qwen2vl {

/// UnsupportedError, saying what the file is, where it is not Qwen2-VL's language model, with or without the
/// vision tower.
void require_language_model(const gguf::File& file);

/// Whether the file has a vision tower, of whatever model.
bool has_vision_tower(const gguf::File& file);

/// UnsupportedError, saying whose it is, where the file's vision tower is not Qwen2-VL's; FormatError where
/// it has none.
void require_vision_tower(const gguf::File& file);

/// The features of the language model that the file's vision tower is made for. FormatError where a tensor
/// that tells is missing.
int64_t vision_tower_width(const gguf::File& file);

/// Whether fc1 is named ffn_down and fc2 ffn_up, as in llama.cpp's files of 2024: the shapes tell.
bool has_swapped_feed_forward(const gguf::File& file);

}  // namespace qwen2vl
