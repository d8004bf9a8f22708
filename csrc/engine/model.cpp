#include "engine/model.h"

#include <memory>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "cpu/backend.h"

namespace qwen2vl {

Model::Model(const std::string& path, const ModelOptions& options, const Progress& progress)
    : precision_(options.precision) {
  std::vector<const gguf::File*> files;
  for (const std::string& p : {path, options.mmproj})
    if (!p.empty()) files.push_back(files_.emplace_back(std::make_unique<gguf::File>(p)).get());
  config_ = read_config(files);
  const Weights weights = load_weights(files, config_);
  const int64_t vision_layers = config_.vision ? config_.vision->depth : 0;
  const int64_t total = config_.text.num_hidden_layers + vision_layers;
  int64_t before = 0;  // layers of the halves that are done
  backend_ = cpu::make_cpu_backend(config_, weights, {options.n_threads, options.precision, options.isa},
                                   [&](int64_t done, int64_t of) {
                                     progress(before + done, total);
                                     if (done == of) before += of;
                                   });
  files_.clear();  // everything has been repacked
#ifdef __GLIBC__
  malloc_trim(0);  // what reading the vocabulary has left behind
#endif
}

}  // namespace qwen2vl
