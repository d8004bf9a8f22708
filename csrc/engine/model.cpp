#include "engine/model.h"

#include <memory>
#include <utility>
#include <vector>

#include "gguf/reader.h"

namespace qwen2vl {

ModelFiles open_model(const std::filesystem::path& path, const std::filesystem::path& mmproj,
                      LowRankUpdates updates, Types types) {
  std::vector<std::unique_ptr<gguf::File>> files;
  std::vector<const gguf::File*> views;
  for (const std::filesystem::path& p : {path, mmproj})
    if (!p.empty()) views.push_back(files.emplace_back(std::make_unique<gguf::File>(p)).get());
  ModelConfig config = read_config(views);
  Weights weights = load_weights(std::move(files), config, std::move(updates), types);
  return {std::move(config), std::move(weights)};
}

}  // namespace qwen2vl
