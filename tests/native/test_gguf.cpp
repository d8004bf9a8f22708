#include <doctest/doctest.h>

#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "gguf/reader.h"
#include "gguf/types.h"
#include "quant/block_types.h"
#include "quant/formats.h"
#include "quant/quantize.h"
#include "temporary_folder.h"

using namespace qwen2vl;

namespace {

template <typename T>
std::string pack(T value) {
  std::string out(sizeof value, '\0');
  std::memcpy(out.data(), &value, sizeof value);
  return out;
}

std::string text(const std::string& value) { return pack<uint64_t>(value.size()) + value; }

template <typename T>
std::string key(const std::string& name, uint32_t type, T value) {
  return text(name) + pack(type) + pack(value);
}

std::string array_key(const std::string& name, uint32_t type, uint64_t length, const std::string& items) {
  return text(name) + pack<uint32_t>(9) + pack(type) + pack(length) + items;
}

std::string header(uint64_t n_tensors, uint64_t n_keys) {
  return "GGUF" + pack<uint32_t>(3) + pack(n_tensors) + pack(n_keys);
}

// Seven keys and two tensors: "a", float32 [2, 3] of 1..6, and "b", one block of Q8_0.
std::string example() {
  std::string file = header(2, 7);
  file += key<uint32_t>("small", 4, 7) + key<int8_t>("negative", 1, -1) + key<float>("float", 6, 0.5f);
  file += key<uint64_t>("large", 10, std::numeric_limits<uint64_t>::max()) + key<uint8_t>("bool", 7, 1);
  file += text("string") + pack<uint32_t>(8) + text("hello");
  file += array_key("sections", 5, 3, pack<int32_t>(16) + pack<int32_t>(24) + pack<int32_t>(24));
  file += text("a") + pack<uint32_t>(2) + pack<uint64_t>(3) + pack<uint64_t>(2) + pack<uint32_t>(0) +
          pack<uint64_t>(0);
  file += text("b") + pack<uint32_t>(1) + pack<uint64_t>(32) + pack<uint32_t>(8) + pack<uint64_t>(32);
  file.resize((file.size() + 31) / 32 * 32);
  for (int i = 1; i <= 6; ++i) file += pack(static_cast<float>(i));
  file.resize((file.size() + 31) / 32 * 32);
  return file + std::string(34, '\0');
}

}  // namespace

TEST_CASE("keys are found, typed, with fallbacks for the absent ones alone") {
  const TemporaryFolder folder;
  const gguf::File file(folder.write("example.gguf", example()));
  CHECK(file.keys().size() == 7);
  CHECK(file.get_int("small") == 7);
  CHECK(file.get_int("negative", 5) == -1);
  CHECK(file.get_int("absent", 5) == 5);
  CHECK(file.get_float("float") == 0.5);
  CHECK(file.get_float("small") == 7.0);
  CHECK(file.get_float("absent", 1e6) == 1e6);
  CHECK(file.get_bool("bool", false));
  CHECK(file.get_string("string") == "hello");
  CHECK(file.get_string("absent", "fallback") == "fallback");
  CHECK(file.get_ints("sections") == std::vector<int64_t>{16, 24, 24});
  CHECK(file.get_floats("sections") == std::vector<double>{16, 24, 24});

  const std::string path = file.path();
  CHECK_THROWS_WITH_AS(file.get_int("absent"),
                       (path + ": key 'absent': expected an integer below 2^63, found no such key").c_str(),
                       FormatError);
  CHECK_THROWS_WITH_AS(file.get_int("string", 5),
                       (path + ": key 'string': expected an integer below 2^63, found a string").c_str(),
                       FormatError);
  CHECK_THROWS_AS(file.get_int("large"), FormatError);
  CHECK_THROWS_AS(file.get_int("bool"), FormatError);
  CHECK_THROWS_AS(file.get_bool("small", true), FormatError);
  CHECK_THROWS_AS(file.get_float("string", 1.0), FormatError);
  CHECK_THROWS_AS(file.get_string("sections"), FormatError);
  CHECK_THROWS_AS(file.get_ints("small"), FormatError);
  CHECK_THROWS_AS(file.get_floats("string"), FormatError);
}

TEST_CASE("tensors have numpy's shapes and their data in the file") {
  const TemporaryFolder folder;
  const gguf::File file(folder.write("example.gguf", example()));
  REQUIRE(file.tensors().size() == 2);
  const gguf::Tensor* a = file.find_tensor("a");
  REQUIRE(a != nullptr);
  CHECK(a->shape == std::vector<int64_t>{2, 3});
  CHECK(a->data_bytes == 24);
  std::vector<uint8_t> stored(12);
  a->input->read(a->offset + row_bytes(DType::F32, 3), stored);
  float row[3];
  dequantize_row(DType::F32, stored.data(), 3, row);
  CHECK(row[0] == 4);
  CHECK(row[2] == 6);
  CHECK(file.find_tensor("b")->data_bytes == 34);
  CHECK(file.find_tensor("c") == nullptr);
}

TEST_CASE("no file cut short or with bytes changed does harm") {  // run under the sanitizers in CI
  const TemporaryFolder folder;
  const std::string whole = example();
  for (size_t length = 0; length < whole.size(); ++length) {
    CAPTURE(length);
    CHECK_THROWS_AS(gguf::File(folder.write("cut.gguf", whole.substr(0, length))), FormatError);
  }
  std::mt19937 random(5);
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string changed = whole;
    for (int i = 0; i < 3; ++i) changed[4 + random() % (changed.size() - 80)] = static_cast<char>(random());
    const std::string path = folder.write("changed.gguf", changed);
    try {
      const gguf::File file(path);
      uint32_t sum = 0;
      for (const gguf::Tensor& tensor : file.tensors()) {
        std::vector<uint8_t> stored(tensor.data_bytes);
        tensor.input->read(tensor.offset, stored);
        for (const uint8_t byte : stored) sum += byte;
      }
      CHECK(sum < 1u << 20);
    } catch (const Error& error) {
      ++refused;
      CHECK(std::string(error.what()).rfind(path + ": ", 0) == 0);
    }
  }
  CHECK(refused > 500);
}

TEST_CASE("the types that are computed with are stored as GGUF says") {
  size_t computed = 0;
  for (uint32_t number = 0; number < 64; ++number) {
    const DTypeTraits* traits = find_dtype(number);
    if (traits == nullptr) continue;
    ++computed;
    const gguf::StorageType* stored = gguf::find_storage_type(number);
    REQUIRE(stored != nullptr);
    CHECK(stored->name == traits->name);
    CHECK(stored->block_elements == traits->block_elements);
    CHECK(stored->block_bytes == traits->block_bytes);
    CHECK(find_dtype(stored->name) == traits);
  }
  CHECK(computed == std::size(kDTypes));
  CHECK(find_dtype("q4_0") == &dtype_traits(DType::Q4_0));
  CHECK(find_dtype("Q4") == nullptr);
  CHECK(find_dtype(4u) == nullptr);
  CHECK_THROWS_AS(row_bytes(DType::Q6_K, 128), std::invalid_argument);
  CHECK_THROWS_AS(row_bytes(DType::Q8_0, -32), std::invalid_argument);
}
