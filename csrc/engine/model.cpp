#include "engine/model.h"

#include <memory>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "gguf/reader.h"

namespace qwen2vl {

ModelFiles open_model(const std::filesystem::path& path, const std::filesystem::path& mmproj) {
  std::vector<std::unique_ptr<gguf::File>> files;
  std::vector<const gguf::File*> views;
  for (const std::filesystem::path& p : {path, mmproj})
    if (!p.empty()) views.push_back(files.emplace_back(std::make_unique<gguf::File>(p)).get());
  ModelConfig config = read_config(views);
  Weights weights = load_weights(std::move(files), config);
  return {std::move(config), std::move(weights)};
}

Model::Model(const std::filesystem::path& path, const ModelOptions& options, const Progress& progress)
    : precision_(options.backend.precision) {
  ModelFiles files = open_model(path, options.mmproj);
  config_ = std::move(files.config);
  chosen_ = make_backend(config_, std::move(files.weights), options.backend, progress);
#ifdef __GLIBC__
  malloc_trim(0);  // what reading the vocabulary has left behind
#endif
}

}  // namespace qwen2vl
