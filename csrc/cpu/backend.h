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

/// Repacks the language model's weights for the processor's kernels (progress counts its layers) and runs on
/// it. The vision tower's are repacked when the first image comes, whose progress counts them too: a
/// conversation in words needs neither the time nor the memory. Until then their files stay open.
std::unique_ptr<Backend> make_cpu_backend(const ModelConfig& config, Weights weights,
                                          const CpuOptions& options, const Progress& progress);

}  // namespace qwen2vl::cpu
