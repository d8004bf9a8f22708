// libFuzzer on what is read of a GGUF file before its weights: the header, and what makes a model of it.
//   cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER=clang++ -DQWEN2VL_BUILD_PYTHON=OFF -DQWEN2VL_BUILD_FUZZ=ON
//     -DQWEN2VL_SANITIZE=fuzzer-no-link,address,undefined && cmake --build build/fuzz --target fuzz_gguf
//   python tests/fuzz/make_seeds.py build/fuzz/seeds && mkdir build/fuzz/corpus
//   QWEN2VL_FUZZ_SCRATCH=/dev/shm build/fuzz/fuzz_gguf -max_total_time=600 build/fuzz/corpus build/fuzz/seeds

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "gguf/reader.h"
#include "model/config.h"
#include "model/weights.h"

namespace {

std::filesystem::path scratch() {
  static const std::filesystem::path path = [] {
    const char* folder = std::getenv("QWEN2VL_FUZZ_SCRATCH");  // a file system in memory
    const auto seed = reinterpret_cast<uintptr_t>(&folder);    // another in each process
    return std::filesystem::path(folder == nullptr ? "." : folder) /
           ("fuzz-" + std::to_string(seed) + ".gguf");
  }();
  return path;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::ofstream(scratch(), std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    std::vector<std::unique_ptr<qwen2vl::gguf::File>> files;
    files.push_back(std::make_unique<qwen2vl::gguf::File>(scratch()));
    const std::vector<const qwen2vl::gguf::File*> views{files.front().get()};
    const qwen2vl::ModelConfig config = qwen2vl::read_config(views);
    qwen2vl::load_weights(std::move(files), config);
  } catch (const qwen2vl::Error&) {
  }
  return 0;
}
