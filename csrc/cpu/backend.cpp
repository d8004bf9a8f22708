#include "cpu/backend.h"

#include <atomic>
#include <optional>
#include <stdexcept>
#include <utility>

#include "cpu/language_model.h"
#include "cpu/vision_encoder.h"
#include "model/pixels.h"

namespace qwen2vl::cpu {
namespace {

// Enough rows that loading a panel costs little beside using it; the widest buffer, the MLP's in
// the 2B shape, then takes 18 MB.
constexpr int64_t kMaxBatchRows = 512;

class CpuBackend final : public Backend {
 public:
  CpuBackend(const ModelConfig& config, Weights weights, const CpuOptions& options, const Progress& progress)
      : config_(config),
        ctx_(select_kernels(options.isa), options.n_threads > 0 ? options.n_threads : default_thread_count(),
             options.precision),
        language_model_(config.text, weights.text, ctx_, progress),
        weight_bytes_(language_model_.weight_bytes()) {
    if (!config.vision) return;
    weights.text = {};
    vision_source_ = std::move(weights);
  }

  PageStore& pages() override { return language_model_.pages(); }

  void encode_vision(const float* pixel_values, const GridTHW& grid, float* out,
                     const Progress& progress) override {
    if (!config_.vision) throw std::invalid_argument("this model has no vision tower");
    language_model_.release_buffers();  // a photo's own are larger, and the two are never at work together
    // None of the picture's own work: how long that will take is told from its share.
    if (!vision_encoder_) load_vision([&](int64_t, int64_t total) { progress(0, total); });
    (*vision_encoder_)(ctx_, pixel_values, grid, out, progress);
  }

  void encode_pixels(const uint8_t* pixels, const float* levels, const GridTHW& grid, float* out,
                     const Progress& progress) override {
    if (!config_.vision) throw std::invalid_argument("this model has no vision tower");
    encode_vision(pixel_values(pixels, levels, grid, *config_.vision).data(), grid, out, progress);
  }

  void forward(std::span<const SequenceRows> batch, float* logits, const Progress& progress) override {
    language_model_(ctx_, batch, logits, progress);
  }

  void start_profile() override { ctx_.profile.start(); }
  std::vector<StageRecord> stop_profile() override { return ctx_.profile.stop(); }
  int64_t read_weights() override { return language_model_.read_weights(ctx_); }

  int64_t max_batch_rows() const override { return kMaxBatchRows; }

  int64_t weight_bytes() const override { return weight_bytes_; }

  std::string device() const override { return "cpu"; }
  std::string_view isa() const override { return ctx_.kernels.isa; }
  int n_threads() const override { return ctx_.pool.size(); }

 private:
  void load_vision(const Progress& progress) {
    for (const auto& file : vision_source_->files) file->require_unchanged();
    vision_encoder_.emplace(*config_.vision, *vision_source_->vision, ctx_, progress);
    weight_bytes_ += vision_encoder_->weight_bytes();
    vision_source_.reset();
  }

  ModelConfig config_;
  Context ctx_;
  LanguageModel language_model_;
  std::optional<Weights> vision_source_;  // until the first picture
  std::optional<VisionEncoder> vision_encoder_;
  std::atomic<int64_t> weight_bytes_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const ModelConfig& config, Weights weights,
                                          const CpuOptions& options, const Progress& progress) {
  return std::make_unique<CpuBackend>(config, std::move(weights), options, progress);
}

}  // namespace qwen2vl::cpu
