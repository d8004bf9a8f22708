#include "cpu/backend.h"

#include <optional>
#include <stdexcept>

#include "cpu/language_model.h"
#include "cpu/vision_encoder.h"

namespace qwen2vl::cpu {
namespace {

// Enough rows that loading a panel costs little beside using it; the widest buffer, gate | up of the 2B
// shape, then takes 37 MB.
constexpr int64_t kMaxBatchRows = 512;

class CpuBackend final : public Backend {
 public:
  CpuBackend(const ModelConfig& config, const Weights& weights, const CpuOptions& options,
             const Progress& progress)
      : config_(config),
        ctx_(select_kernels(options.isa), options.n_threads > 0 ? options.n_threads : default_thread_count(),
             options.precision),
        language_model_(config.text, weights.text, ctx_, progress) {
    if (config.vision) vision_encoder_.emplace(*config.vision, *weights.vision, ctx_, progress);
  }

  std::unique_ptr<KvCache> new_cache() const override {
    return std::make_unique<PagedKvCache>(config_.text, ctx_.precision);
  }

  void encode_vision(const float* pixel_values, const GridTHW& grid, float* out,
                     const Progress& progress) override {
    if (!vision_encoder_) throw std::invalid_argument("this model has no vision tower");
    (*vision_encoder_)(ctx_, pixel_values, grid, out, progress);
  }

  void forward(std::span<const SequenceRows> batch, float* logits, const Progress& progress) override {
    language_model_(ctx_, batch, logits, progress);
  }

  Profile& profile() override { return ctx_.profile; }

  int64_t max_batch_rows() const override { return kMaxBatchRows; }

  int64_t weight_bytes() const override {
    return language_model_.weight_bytes() + (vision_encoder_ ? vision_encoder_->weight_bytes() : 0);
  }

  std::string_view isa() const override { return ctx_.kernels.isa; }
  int n_threads() const override { return ctx_.pool.size(); }

 private:
  ModelConfig config_;
  Context ctx_;
  LanguageModel language_model_;
  std::optional<VisionEncoder> vision_encoder_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const ModelConfig& config, const Weights& weights,
                                          const CpuOptions& options, const Progress& progress) {
  return std::make_unique<CpuBackend>(config, weights, options, progress);
}

}  // namespace qwen2vl::cpu
