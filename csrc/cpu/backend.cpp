#include "cpu/backend.h"

#include <atomic>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <utility>

#include "base/pieces.h"
#include "cpu/language_model.h"
#include "cpu/vision_encoder.h"

namespace qwen2vl::cpu {
namespace {

// Enough rows that loading a panel costs little beside using it; the widest buffer, the MLP's in
// the 2B shape, then takes 18 MB.
constexpr int64_t kMaxBatchRows = 512;

class CpuBackend final : public Backend, private Instruments {
 public:
  CpuBackend(const ModelConfig& config, Weights weights, const CpuOptions& options, const Progress& progress)
      : config_(config),
        ctx_(select_kernels(options.isa), options.n_threads > 0 ? options.n_threads : default_thread_count(),
             options.precision),
        language_model_(config.text, weights.text, ctx_, progress),
        vision_encoder_(config.vision.value_or(VisionConfig{})),
        weight_bytes_(language_model_.weight_bytes()) {
    if (!config.vision) return;
    weights.text = {};
    vision_source_ = std::move(weights);
  }

  PageStore& pages() override { return language_model_.pages(); }

  std::unique_ptr<VisionPass> begin_vision(const VisionInput& input, float* out) override {
    if (!config_.vision) throw std::invalid_argument("this model has no vision tower");
    return std::make_unique<Pass>(encode(input, out), config_.vision->depth);
  }

  void forward(std::span<const SequenceRows> batch, float* logits, const Progress& progress) override {
    language_model_(ctx_, batch, logits, progress);
  }

  Instruments& instruments() override { return *this; }
  void start_profile() override { ctx_.profile.start(); }
  std::vector<StageRecord> stop_profile() override { return ctx_.profile.stop(); }
  int64_t read_weights() override { return language_model_.read_weights(ctx_); }

  int64_t max_batch_rows() const override { return kMaxBatchRows; }

  int64_t weight_bytes() const override { return weight_bytes_; }

  std::string device() const override { return "cpu"; }
  std::string_view isa() const override { return ctx_.kernels.isa; }
  int n_threads() const override { return ctx_.pool.size(); }

 private:
  class Pass final : public VisionPass {
   public:
    Pass(Pieces work, int64_t depth) : work_(std::move(work)), depth_(depth) {}

    bool advance(double seconds, const Progress& progress) override {
      const auto start = std::chrono::steady_clock::now();
      while (work_.next()) {
        progress(work_.done(), depth_);
        if (std::chrono::steady_clock::now() - start >= std::chrono::duration<double>(seconds)) return false;
      }
      progress(depth_, depth_);
      return true;
    }

   private:
    Pieces work_;
    int64_t depth_;
  };

  Pieces encode(VisionInput input, float* out) {
    language_model_.release_buffers();  // a photo's own are larger, and the two seldom are at work together
    while (vision_source_) {
      pack_vision();
      co_yield 0;  // none of the image's own work: how long that will take is told from its share
    }
    for (Pieces work = vision_encoder_(ctx_, input, out); work.next();) co_yield work.done();
  }

  void pack_vision() {
    for (const auto& file : vision_source_->files) file->require_unchanged();
    if (!vision_encoder_.pack_next(*vision_source_->vision, ctx_)) return;
    weight_bytes_ += vision_encoder_.weight_bytes();
    vision_source_.reset();
  }

  ModelConfig config_;
  Context ctx_;
  LanguageModel language_model_;
  std::optional<Weights> vision_source_;  // until the first image
  VisionEncoder vision_encoder_;
  std::atomic<int64_t> weight_bytes_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const ModelConfig& config, Weights weights,
                                          const CpuOptions& options, const Progress& progress) {
  return std::make_unique<CpuBackend>(config, std::move(weights), options, progress);
}

}  // namespace qwen2vl::cpu
