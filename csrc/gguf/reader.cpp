#include "gguf/reader.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <optional>

#include "gguf/cursor.h"
#include "gguf/types.h"

namespace qwen2vl::gguf {
namespace {

static_assert(std::endian::native == std::endian::little, "files are read in their own byte order");

// Far above any model's (a 72B file has about 50 keys, 1,500 tensors and arrays of 150,000 tokens), and low
// enough that no header, whatever it says, takes more than a few hundred megabytes.
constexpr uint64_t kMaxEntries = 65'536;
constexpr uint64_t kMaxArrayElements = uint64_t{1} << 24;  // over all arrays of a file
constexpr uint64_t kMaxNameBytes = 65'535;

// Tensor data is read in place, so the least alignment is that of the largest element (F64, I64); the most is
// the largest page that any system has.
constexpr uint64_t kMinAlignment = 8;
constexpr uint64_t kMaxAlignment = 65'536;

constexpr uint32_t kTypeString = 8;
constexpr uint32_t kTypeArray = 9;

template <typename StoredType, typename WideType>
struct Kind {
  using Stored = StoredType;
  using Wide = WideType;
};

/// fn(Kind) for the scalar value type numbered `type`.
template <typename Fn>
Value with_kind(const Cursor& in, uint32_t type, const Fn& fn) {
  switch (type) {
    case 0:
      return fn(Kind<uint8_t, uint64_t>{});
    case 1:
      return fn(Kind<int8_t, int64_t>{});
    case 2:
      return fn(Kind<uint16_t, uint64_t>{});
    case 3:
      return fn(Kind<int16_t, int64_t>{});
    case 4:
      return fn(Kind<uint32_t, uint64_t>{});
    case 5:
      return fn(Kind<int32_t, int64_t>{});
    case 6:
      return fn(Kind<float, double>{});
    case 7:
      return fn(Kind<bool, bool>{});
    case kTypeString:
      return fn(Kind<std::string_view, std::string_view>{});
    case 10:
      return fn(Kind<uint64_t, uint64_t>{});
    case 11:
      return fn(Kind<int64_t, int64_t>{});
    case 12:
      return fn(Kind<double, double>{});
    default:
      in.fail("expected a value type from 0 to 12, found ", type);
  }
}

Value read_array(Cursor& in, uint64_t* elements_left) {
  const auto type = in.get<uint32_t>();
  if (type == kTypeArray) in.fail("arrays of arrays are not supported");
  const auto length = in.get<uint64_t>();
  return with_kind(in, type, [&](auto kind) -> Value {
    using Stored = typename decltype(kind)::Stored;
    using Wide = typename decltype(kind)::Wide;
    in.need(length, type == kTypeString ? sizeof(uint64_t) : sizeof(Stored), "array elements");
    if (length > *elements_left) {
      in.fail("expected at most ", kMaxArrayElements, " array elements in all, found an array of ", length,
              " with ", *elements_left, " left");
    }
    *elements_left -= length;
    std::vector<Wide> values;
    values.reserve(static_cast<size_t>(length));
    for (uint64_t i = 0; i < length; ++i) values.push_back(static_cast<Wide>(in.get<Stored>()));
    return Array(std::move(values));
  });
}

Value read_value(Cursor& in, uint64_t* elements_left) {
  const auto type = in.get<uint32_t>();
  if (type == kTypeArray) return read_array(in, elements_left);
  return with_kind(in, type, [&](auto kind) -> Value {
    using Wide = typename decltype(kind)::Wide;
    return Value(std::in_place_type<Wide>, static_cast<Wide>(in.get<typename decltype(kind)::Stored>()));
  });
}

std::string_view read_name(Cursor& in) {
  const auto name = in.get<std::string_view>();
  if (name.empty() || name.size() > kMaxNameBytes) {
    in.fail("expected a name of 1 to ", kMaxNameBytes, " bytes, found ", name.size());
  }
  return name;
}

uint32_t read_version(Cursor& in, const std::string& path) {
  in.need(4, 1, "bytes of magic");
  std::string magic(4, '\0');
  for (char& c : magic) c = in.get<char>();
  if (magic != "GGUF") in.fail("not a GGUF file: expected it to start with 'GGUF', found ", in_quotes(magic));
  const auto version = in.get<uint32_t>();
  if (version != 0 && (version & 0xffff) == 0) {
    throw UnsupportedError(path + ": header: a big-endian GGUF file; expected little-endian");
  }
  if (version != 2 && version != 3) {
    throw UnsupportedError(path + ": header: GGUF version " + std::to_string(version) + "; expected 2 or 3");
  }
  return version;
}

uint64_t read_count(Cursor& in, uint64_t min_bytes, std::string_view what) {
  const auto count = in.get<uint64_t>();
  in.need(count, min_bytes, what);
  if (count > kMaxEntries) in.fail("expected at most ", kMaxEntries, " ", what, ", found ", count);
  return count;
}

uint64_t read_alignment(Cursor& in, const Value* value) {
  if (value == nullptr) return 32;  // GGUF's default
  in.enter("key 'general.alignment'");
  const auto* number = std::get_if<uint64_t>(value);
  if (number == nullptr) in.fail("expected an unsigned integer");
  if (!std::has_single_bit(*number) || *number < kMinAlignment || *number > kMaxAlignment) {
    in.fail("expected a power of two from ", kMinAlignment, " to ", kMaxAlignment, ", found ", *number);
  }
  return *number;
}

/// A tensor's entry; `offset` still counts from the start of the data.
Tensor read_tensor(Cursor& in, const std::string& path) {
  Tensor tensor{read_name(in), 0, {}, 0, 0};
  in.enter("tensor " + in_quotes(tensor.name));
  const auto n_dims = in.get<uint32_t>();
  if (n_dims < 1 || n_dims > 4) in.fail("expected 1 to 4 dimensions, found ", n_dims);
  uint64_t elements = 1;
  for (uint32_t i = 0; i < n_dims; ++i) {
    const auto dim = in.get<uint64_t>();
    constexpr uint64_t kMax = std::numeric_limits<int64_t>::max();
    if (dim < 1 || dim > kMax) in.fail("expected dimension ", i, " from 1 to ", kMax, ", found ", dim);
    if (dim > kMax / elements) in.fail("the product of the dimensions overflows 64 bits");
    elements *= dim;
    tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(dim));
  }
  tensor.type = in.get<uint32_t>();
  const StorageType* type = find_storage_type(tensor.type);
  if (const std::string_view name = withdrawn_type(tensor.type); !name.empty()) {
    throw UnsupportedError(path + ": tensor " + in_quotes(tensor.name) + ": stored as " + std::string(name) +
                           ", which GGUF has withdrawn");
  }
  if (type == nullptr) in.fail("expected a tensor type of GGUF, found ", static_cast<int32_t>(tensor.type));
  const auto row = static_cast<uint64_t>(tensor.shape.back());
  if (row % type->block_elements != 0) {
    in.fail("expected rows of a multiple of ", type->block_elements, " values for type ", type->name,
            ", found ", row);
  }
  const uint64_t blocks = elements / type->block_elements;
  if (blocks > std::numeric_limits<int64_t>::max() / type->block_bytes) in.fail("its size overflows 64 bits");
  tensor.data_bytes = blocks * type->block_bytes;
  tensor.offset = in.get<uint64_t>();
  return tensor;
}

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

}  // namespace

File::File(const std::filesystem::path& path) : input_(path) {
  Cursor in(input_, header_);
  version_ = read_version(in, this->path());
  const auto n_tensors =
      read_count(in, 32, "tensors");             // name length, a dimension count and size, type, offset
  const auto n_kv = read_count(in, 13, "keys");  // key length, value type, a one-byte value

  uint64_t elements_left = kMaxArrayElements;
  metadata_.reserve(n_kv);
  for (uint64_t i = 0; i < n_kv; ++i) {
    in.enter("key number " + std::to_string(i));
    const auto key = read_name(in);
    in.enter("key " + in_quotes(key));
    if (!metadata_index_.emplace(key, metadata_.size()).second) in.fail("the key occurs twice");
    metadata_.emplace_back(key, read_value(in, &elements_left));
  }
  alignment_ = read_alignment(in, find("general.alignment"));

  tensors_.reserve(n_tensors);
  for (uint64_t i = 0; i < n_tensors; ++i) {
    in.enter("tensor number " + std::to_string(i));
    tensors_.push_back(read_tensor(in, this->path()));
    if (!tensor_index_.emplace(tensors_.back().name, i).second) in.fail("the tensor occurs twice");
  }
  place_tensors(in);
  require_apart();
}

/// Makes the tensors' offsets count from the start of the file.
void File::place_tensors(Cursor& in) {
  const uint64_t file_bytes = input_.size();
  const uint64_t data_begin = (in.position() + alignment_ - 1) / alignment_ * alignment_;
  const uint64_t data_bytes = file_bytes - std::min(data_begin, file_bytes);
  for (Tensor& tensor : tensors_) {
    in.enter("tensor " + in_quotes(tensor.name));
    if (tensor.offset % alignment_ != 0) {
      in.fail("expected an offset that is a multiple of ", alignment_, ", found ", tensor.offset);
    }
    if (tensor.offset > data_bytes || tensor.data_bytes > data_bytes - tensor.offset) {
      in.fail("expected ", tensor.data_bytes, " bytes at offset ", tensor.offset, " of the data, which is ",
              data_bytes, " bytes long: the file is cut short or damaged");
    }
    tensor.offset += data_begin;
  }
}

/// Tensors that share bytes would make a small file large in memory.
void File::require_apart() const {
  std::vector<const Tensor*> order;
  for (const Tensor& tensor : tensors_) order.push_back(&tensor);
  std::sort(order.begin(), order.end(),
            [](const Tensor* a, const Tensor* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const Tensor &before = *order[i - 1], &after = *order[i];
    if (after.offset - before.offset < before.data_bytes) {
      throw FormatError(path() + ": tensor " + in_quotes(after.name) +
                        ": expected data of its own, found it within that of tensor " +
                        in_quotes(before.name));
    }
  }
}

const Value* File::find(std::string_view key) const {
  const auto found = metadata_index_.find(key);
  return found == metadata_index_.end() ? nullptr : &metadata_[found->second].second;
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
