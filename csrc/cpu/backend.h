#pragma once

#include <memory>
#include <string_view>

#include "model/backend.h"
#include "model/weights.h"

namespace qwen2vl::cpu {

struct CpuOptions {
  int n_threads = 0;  ///< 0: default_thread_count()
  Precision precision = Precision::Fast;
  std::string_view isa;  ///< empty: the best one
};

/// Repacks the weights for the processor's kernels (progress counts the layers of each half) and runs on it.
std::unique_ptr<Backend> make_cpu_backend(const ModelConfig& config, const Weights& weights,
                                          const CpuOptions& options, const Progress& progress);

}  // namespace qwen2vl::cpu
