#include "gguf/part.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>
#include <unordered_set>
#include <utility>

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
Tensor read_tensor(Cursor& in, const InputFile& input) {
  Tensor tensor{read_name(in), 0, {}, 0, 0, &input};
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
    throw UnsupportedError(input.name() + ": tensor " + in_quotes(tensor.name) + ": stored as " +
                           std::string(name) + ", which GGUF has withdrawn");
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

}  // namespace

Part::Part(const std::filesystem::path& path) : input(path) {
  Cursor in(input, header);
  version = read_version(in, input.name());
  const auto n_tensors =
      read_count(in, 32, "tensors");             // name length, a dimension count and size, type, offset
  const auto n_kv = read_count(in, 13, "keys");  // key length, value type, a one-byte value

  uint64_t elements_left = kMaxArrayElements;
  keys.reserve(n_kv);
  for (uint64_t i = 0; i < n_kv; ++i) {
    in.enter("key number " + std::to_string(i));
    const uint64_t offset = in.position();
    const auto key = read_name(in);
    in.enter("key " + in_quotes(key));
    if (!key_index.emplace(key, i).second) in.fail("the key occurs twice");
    Value value = read_value(in, &elements_left);
    keys.push_back({key, std::move(value), offset, in.position() - offset});
  }
  alignment = read_alignment(in, find("general.alignment"));

  tensors.reserve(n_tensors);
  std::unordered_set<std::string_view> names;
  for (uint64_t i = 0; i < n_tensors; ++i) {
    in.enter("tensor number " + std::to_string(i));
    tensors.push_back(read_tensor(in, input));
    if (!names.insert(tensors.back().name).second) in.fail("the tensor occurs twice");
  }
  place_tensors(in);
  require_apart();
}

/// Makes the tensors' offsets count from the start of the file.
void Part::place_tensors(Cursor& in) {
  const uint64_t file_bytes = input.size();
  const uint64_t data_begin = (in.position() + alignment - 1) / alignment * alignment;
  const uint64_t data_bytes = file_bytes - std::min(data_begin, file_bytes);
  for (Tensor& tensor : tensors) {
    in.enter("tensor " + in_quotes(tensor.name));
    if (tensor.offset % alignment != 0) {
      in.fail("expected an offset that is a multiple of ", alignment, ", found ", tensor.offset);
    }
    if (tensor.offset > data_bytes || tensor.data_bytes > data_bytes - tensor.offset) {
      in.fail("expected ", tensor.data_bytes, " bytes at offset ", tensor.offset, " of the data, which is ",
              data_bytes, " bytes long: the file is cut short or damaged");
    }
    tensor.offset += data_begin;
  }
}

/// Tensors that share bytes would make a small file large in memory.
void Part::require_apart() const {
  std::vector<const Tensor*> order;
  for (const Tensor& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(),
            [](const Tensor* a, const Tensor* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const Tensor &before = *order[i - 1], &after = *order[i];
    if (after.offset - before.offset < before.data_bytes) {
      throw FormatError(input.name() + ": tensor " + in_quotes(after.name) +
                        ": expected data of its own, found it within that of tensor " +
                        in_quotes(before.name));
    }
  }
}

const Value* Part::find(std::string_view key) const {
  const auto found = key_index.find(key);
  return found == key_index.end() ? nullptr : &keys[found->second].value;
}

}  // namespace qwen2vl::gguf
