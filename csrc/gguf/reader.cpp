#include "gguf/reader.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <optional>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "gguf/cursor.h"

namespace qwen2vl::gguf {
namespace {

constexpr const char* kInteger = "an integer below 2^63";
constexpr const char* kIntegers = "an array of integers below 2^63";

const char* kind_name(const Value& value) {
  constexpr const char* kScalars[] = {"a signed integer", "an unsigned integer", "a float", "a bool",
                                      "a string"};
  constexpr const char* kArrays[] = {"an array of signed integers", "an array of unsigned integers",
                                     "an array of floats", "an array of bools", "an array of strings"};
  const auto* array = std::get_if<Array>(&value);
  return array != nullptr ? kArrays[array->index()] : kScalars[value.index()];
}

std::optional<int64_t> as_int(const Value& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) return *number;
  const auto* number = std::get_if<uint64_t>(&value);
  if (number == nullptr || *number > uint64_t{std::numeric_limits<int64_t>::max()}) return std::nullopt;
  return static_cast<int64_t>(*number);
}

std::optional<double> as_float(const Value& value) {
  if (const auto* number = std::get_if<double>(&value)) return *number;
  if (const auto* number = std::get_if<int64_t>(&value)) return static_cast<double>(*number);
  if (const auto* number = std::get_if<uint64_t>(&value)) return static_cast<double>(*number);
  return std::nullopt;
}

template <typename T>
std::optional<T> as(const Value& value) {
  const auto* found = std::get_if<T>(&value);
  return found == nullptr ? std::nullopt : std::optional<T>(*found);
}

std::optional<std::vector<int64_t>> as_ints(const Value& value) {
  const auto* array = std::get_if<Array>(&value);
  if (array == nullptr) return std::nullopt;
  if (const auto* numbers = std::get_if<std::vector<int64_t>>(array)) return *numbers;
  const auto* numbers = std::get_if<std::vector<uint64_t>>(array);
  if (numbers == nullptr) return std::nullopt;
  const auto fits = [](uint64_t n) { return n <= uint64_t{std::numeric_limits<int64_t>::max()}; };
  if (!std::all_of(numbers->begin(), numbers->end(), fits)) return std::nullopt;
  return std::vector<int64_t>(numbers->begin(), numbers->end());
}

std::optional<std::vector<double>> as_floats(const Value& value) {
  const auto* array = std::get_if<Array>(&value);
  if (array == nullptr) return std::nullopt;
  return std::visit(
      [](const auto& values) -> std::optional<std::vector<double>> {
        using T = typename std::decay_t<decltype(values)>::value_type;
        if constexpr (std::is_arithmetic_v<T> && !std::is_same_v<T, bool>) {
          return std::vector<double>(values.begin(), values.end());
        } else {
          return std::nullopt;
        }
      },
      *array);
}

/// The value of `key` as `convert` reads it, or `fallback` where the key is absent and there is one.
template <typename T>
T look_up(const File& file, std::string_view key, const char* expected,
          std::optional<T> (*convert)(const Value&), std::optional<T> fallback) {
  const Value* value = file.find(key);
  if (value == nullptr && fallback) return *std::move(fallback);
  std::optional<T> converted = value == nullptr ? std::nullopt : convert(*value);
  if (!converted) {
    throw FormatError(file.path() + ": key " + in_quotes(key) + ": expected " + expected + ", found " +
                      (value == nullptr ? "no such key" : kind_name(*value)));
  }
  return *std::move(converted);
}

// Far above the 150 of a 72B model in F32 and pieces of 2 GB.
constexpr int64_t kMostParts = 1024;
constexpr int64_t kMostTensors = 65'536;

int64_t split_number(const Part& part, std::string_view key, int64_t least, int64_t most) {
  const Value* value = part.find(key);
  const std::optional<int64_t> number = value == nullptr ? std::nullopt : as_int(*value);
  if (number && *number >= least && *number <= most) return *number;
  throw FormatError(part.input.name() + ": key " + in_quotes(key) + ": expected " + std::to_string(least) +
                    ".." + std::to_string(most) + ", found " +
                    (number             ? std::to_string(*number)
                     : value == nullptr ? "no such key"
                                        : kind_name(*value)));
}

void require_number(const Part& part, std::string_view key, int64_t expected, const Part& other) {
  const int64_t found = split_number(part, key, 0, kMostTensors);
  if (found == expected) return;
  throw FormatError(part.input.name() + ": key " + in_quotes(key) + ": expected " + std::to_string(expected) +
                    " in a part of " + other.input.name() + ", found " + std::to_string(found));
}

/// How the name of part `no` (from 0) of `count` ends, as llama.cpp has it.
std::filesystem::path::string_type part_suffix(int64_t no, int64_t count) {
  char suffix[64];
  const int n = std::snprintf(suffix, sizeof suffix, "-%05d-of-%05d.gguf", static_cast<int>(no + 1),
                              static_cast<int>(count));
  return {suffix, suffix + n};
}

/// The paths of all parts of the file that `part`, at `path`, is number `no` of.
std::vector<std::filesystem::path> part_paths(const std::filesystem::path& path, const Part& part, int64_t no,
                                              int64_t count) {
  auto stem = path.native();
  const auto own = part_suffix(no, count);
  if (!stem.ends_with(own))
    throw FormatError(part.input.name() + ": part " + std::to_string(no + 1) + " of " +
                      std::to_string(count) + " by its keys: expected a name that ends in '" +
                      printable_path(own) + "'");
  stem.resize(stem.size() - own.size());
  std::vector<std::filesystem::path> paths;
  std::string missing;
  for (int64_t i = 0; i < count; ++i) {
    paths.emplace_back(stem + part_suffix(i, count));
    std::error_code unused;
    if (missing.empty() && !std::filesystem::exists(paths.back(), unused))
      missing = printable_path(paths.back().filename());
  }
  if (!missing.empty())
    throw FormatError(part.input.name() + ": one of " + std::to_string(count) + " parts, of which " +
                      missing + " is missing");
  return paths;
}

std::vector<std::unique_ptr<Part>> open_parts(const std::filesystem::path& path) {
  std::vector<std::unique_ptr<Part>> parts;
  auto named = std::make_unique<Part>(path);
  const int64_t count =
      named->find("split.count") == nullptr ? 1 : split_number(*named, "split.count", 0, kMostParts);
  if (count < 2) {  // 0: merged again by llama.cpp
    parts.push_back(std::move(named));
    return parts;
  }
  const int64_t own = split_number(*named, "split.no", 0, count - 1);
  const int64_t n_tensors = split_number(*named, "split.tensors.count", 0, kMostTensors);
  const Part& reference = *named;
  const auto paths = part_paths(path, reference, own, count);
  for (int64_t i = 0; i < count; ++i) {
    parts.push_back(i == own ? std::move(named) : std::make_unique<Part>(paths[i]));
    require_number(*parts.back(), "split.no", i, reference);
    require_number(*parts.back(), "split.count", count, reference);
    require_number(*parts.back(), "split.tensors.count", n_tensors, reference);
  }
  return parts;
}

}  // namespace

File::File(const std::filesystem::path& path) : parts_(open_parts(path)) {
  for (const auto& part : parts_) {
    for (const Tensor& tensor : part->tensors) {
      const auto [place, is_new] = tensor_index_.emplace(tensor.name, tensors_.size());
      if (!is_new)
        throw FormatError(part->input.name() + ": tensor " + in_quotes(tensor.name) + ": is also in " +
                          tensors_[place->second].input->name());
      tensors_.push_back(tensor);
    }
  }
  if (parts_.size() > 1 && static_cast<int64_t>(tensors_.size()) != get_int("split.tensors.count"))
    throw FormatError(this->path() + ": key 'split.tensors.count': expected " +
                      std::to_string(tensors_.size()) + ", the tensors of all parts, found " +
                      std::to_string(get_int("split.tensors.count")));
}

uint64_t File::n_bytes() const {
  uint64_t n_bytes = 0;
  for (const auto& part : parts_) n_bytes += part->input.size();
  return n_bytes;
}

void File::require_unchanged() const {
  for (const auto& part : parts_) part->input.require_unchanged();
}

const Tensor* File::find_tensor(std::string_view name) const {
  const auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

int64_t File::get_int(std::string_view key) const {
  return look_up<int64_t>(*this, key, kInteger, as_int, std::nullopt);
}
int64_t File::get_int(std::string_view key, int64_t fallback) const {
  return look_up<int64_t>(*this, key, kInteger, as_int, fallback);
}
double File::get_float(std::string_view key) const {
  return look_up<double>(*this, key, "a number", as_float, std::nullopt);
}
double File::get_float(std::string_view key, double fallback) const {
  return look_up<double>(*this, key, "a number", as_float, fallback);
}
bool File::get_bool(std::string_view key, bool fallback) const {
  return look_up<bool>(*this, key, "a bool", as<bool>, fallback);
}
std::string_view File::get_string(std::string_view key) const {
  return look_up<std::string_view>(*this, key, "a string", as<std::string_view>, std::nullopt);
}
std::string_view File::get_string(std::string_view key, std::string_view fallback) const {
  return look_up<std::string_view>(*this, key, "a string", as<std::string_view>, fallback);
}
std::vector<int64_t> File::get_ints(std::string_view key) const {
  return look_up<std::vector<int64_t>>(*this, key, kIntegers, as_ints, std::nullopt);
}
std::vector<double> File::get_floats(std::string_view key) const {
  return look_up<std::vector<double>>(*this, key, "an array of numbers", as_floats, std::nullopt);
}

}  // namespace qwen2vl::gguf
