#include "engine/model.h"

#include <memory>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "gguf/reader.h"
#include "model/weights.h"

namespace qwen2vl {

Model::Model(const std::filesystem::path& path, const ModelOptions& options, const Progress& progress)
    : precision_(options.backend.precision) {
  std::vector<std::unique_ptr<gguf::File>> files;
  std::vector<const gguf::File*> views;
  for (const std::filesystem::path& p : {path, options.mmproj})
    if (!p.empty()) views.push_back(files.emplace_back(std::make_unique<gguf::File>(p)).get());
  config_ = read_config(views);
  chosen_ = make_backend(config_, load_weights(std::move(files), config_), options.backend, progress);
#ifdef __GLIBC__
  malloc_trim(0);  // what reading the vocabulary has left behind
#endif
}

}  // namespace qwen2vl
