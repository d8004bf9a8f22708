#include "engine/plugin_backend.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "engine/plugin.h"
#include "engine/plugin_model.h"

namespace qwen2vl {
namespace {

/// A Progress for plug-ins. What it throws waits here until their call has come back: exceptions must not
/// cross the interface.
class Reporter {
 public:
  explicit Reporter(const Progress& progress) : progress_(progress) {}
  Reporter(const Reporter&) = delete;
  Reporter& operator=(const Reporter&) = delete;

  qwen2vl_progress get() { return {&report, this}; }

  /// Throws what a call's status stands for.
  void check(int status, const qwen2vl_error& error) const {
    if (status == QWEN2VL_CANCELLED && thrown_) std::rethrow_exception(thrown_);
    check_plugin(status, error);
  }

 private:
  static int report(void* context, int64_t done, int64_t total) {
    Reporter& self = *static_cast<Reporter*>(context);
    try {
      self.progress_(done, total);
      return 0;
    } catch (...) {
      self.thrown_ = std::current_exception();
      return 1;
    }
  }

  const Progress& progress_;
  std::exception_ptr thrown_;
};

/// A plug-in's backend and what it points at.
class Handle {
 public:
  Handle(const qwen2vl_backend_api& api_, const ModelConfig& config, Weights&& weights,
         const PluginOptions& options, const Progress& progress)
      : api(api_), model_(config, weights) {
    const qwen2vl_options c_options{options.device, options.more_devices,
                                    options.precision == Precision::Exact, options.memory_bytes};
    Reporter reporter(progress);
    qwen2vl_error error{};
    reporter.check(api.create(&model_.get(), &c_options, reporter.get(), &backend, &error), error);
    weights_ = std::move(weights);  // the numbers themselves stay where they are
  }
  ~Handle() { api.destroy(backend); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  const std::vector<std::unique_ptr<gguf::File>>& files() const { return weights_.files; }

  /// The files' pages have been copied to where they are used.
  void release_pages() const { model_.release_pages(); }

  const qwen2vl_backend_api& api;
  qwen2vl_backend_handle* backend = nullptr;

 private:
  PluginModel model_;
  Weights weights_;
};

class PluginPages final : public PageStore {
 public:
  explicit PluginPages(const Handle& handle) : handle_(handle) {
    qwen2vl_info info{};
    handle.api.info(handle.backend, &info);
    cells_ = info.page_cells;
    bytes_ = info.page_bytes;
    if (cells_ < 1 || bytes_ < 1)
      throw DeviceError("the plug-in: expected pages of some cells and bytes, found " +
                        std::to_string(cells_) + " and " + std::to_string(bytes_));
  }

  int64_t page_cells() const override { return cells_; }
  int64_t page_bytes() const override { return bytes_; }
  PageHandle make() override {
    qwen2vl_page_handle* made = nullptr;
    qwen2vl_error error{};
    check_plugin(handle_.api.new_page(handle_.backend, &made, &error), error);
    return made;
  }
  void free(PageHandle page) noexcept override {
    handle_.api.free_page(handle_.backend, static_cast<qwen2vl_page_handle*>(page));
  }
  void copy(PageHandle from, PageHandle to) override {
    qwen2vl_error error{};
    check_plugin(handle_.api.copy_page(handle_.backend, static_cast<qwen2vl_page_handle*>(from),
                                       static_cast<qwen2vl_page_handle*>(to), &error),
                 error);
  }

 private:
  const Handle& handle_;
  int64_t cells_ = 0, bytes_ = 0;
};

class PluginBackend final : public Backend, private Instruments {
 public:
  PluginBackend(const qwen2vl_backend_api& api, const ModelConfig& config, Weights&& weights,
                const PluginOptions& options, const Progress& progress)
      : handle_(api, config, std::move(weights), options, progress),
        pages_(handle_),
        has_vision_(config.vision.has_value()) {
    handle_.release_pages();
    read_info();
    device_ = plugin_text(info_.device);
  }

  PageStore& pages() override { return pages_; }

  std::unique_ptr<VisionPass> begin_vision(const VisionInput& input, float* out) override {
    if (!has_vision_) throw std::invalid_argument("this model has no vision tower");
    return std::make_unique<Pass>(*this, input, out);
  }

  void forward(std::span<const SequenceRows> batch, float* logits, const Progress& progress) override {
    page_handles_.clear();
    for (const SequenceRows& s : batch)
      for (const PageHandle page : s.pages) page_handles_.push_back(static_cast<qwen2vl_page_handle*>(page));
    std::vector<qwen2vl_rows> rows;
    size_t page = 0;
    for (const SequenceRows& s : batch) {
      rows.push_back({page_handles_.data() + page, static_cast<int64_t>(s.pages.size()), s.first_cell,
                      static_cast<int64_t>(s.token_ids.size()), s.token_ids.data(), s.embeddings.data(),
                      s.positions.empty() ? nullptr : s.positions.data()->data(),
                      static_cast<int32_t>(s.logits)});
      page += s.pages.size();
    }
    Reporter reporter(progress);
    qwen2vl_error error{};
    reporter.check(api().forward(handle_.backend, rows.data(), static_cast<int64_t>(rows.size()), logits,
                                 reporter.get(), &error),
                   error);
  }

  bool keeps_logits() const override { return true; }

  void kept_logits(int64_t row, float* out) override {
    qwen2vl_error error{};
    check_plugin(api().kept_logits(handle_.backend, row, out, &error), error);
  }

  int32_t likeliest(int64_t row) override {
    int32_t token = -1;
    qwen2vl_error error{};
    check_plugin(api().likeliest(handle_.backend, row, &token, &error), error);
    return token;
  }

  int64_t max_batch_rows() const override {
    const std::lock_guard lock(info_mutex_);
    return std::max<int64_t>(1, info_.max_batch_rows);
  }

  Instruments& instruments() override { return *this; }

  void start_profile() override {
    qwen2vl_error error{};
    check_plugin(api().start_profile(handle_.backend, &error), error);
  }

  std::vector<StageRecord> stop_profile() override {
    constexpr int32_t kMost = 256;  // stages: a forward pass has some thirty names
    std::vector<qwen2vl_stage> stages(kMost);
    int32_t count = 0;
    qwen2vl_error error{};
    check_plugin(api().stop_profile(handle_.backend, stages.data(), kMost, &count, &error), error);
    stages.resize(std::clamp(count, 0, kMost));
    std::vector<StageRecord> records;
    for (const qwen2vl_stage& s : stages)
      records.push_back({plugin_text(s.name), s.calls, s.seconds, {s.int8_ops, s.float_ops, s.bytes}});
    return records;
  }

  int64_t read_weights() override {
    int64_t bytes = 0;
    qwen2vl_error error{};
    check_plugin(api().read_weights(handle_.backend, &bytes, &error), error);
    return bytes;
  }

  int64_t weight_bytes() const override {
    const std::lock_guard lock(info_mutex_);
    return info_.weight_bytes;
  }
  std::string device() const override { return device_; }
  std::string_view isa() const override { return device_; }
  int n_threads() const override { return 0; }
  std::string note() const override {
    const std::lock_guard lock(info_mutex_);
    return plugin_text(info_.note);
  }

 private:
  /// The interface encodes whole: one piece.
  class Pass final : public VisionPass {
   public:
    Pass(PluginBackend& backend, const VisionInput& input, float* out)
        : backend_(backend), input_(input), out_(out) {}
    bool advance(double, const Progress& progress) override {
      if (!done_) backend_.encode(input_, out_, progress);
      return done_ = true;
    }

   private:
    PluginBackend& backend_;
    VisionInput input_;
    float* out_;
    bool done_ = false;
  };

  void encode(const VisionInput& input, float* out, const Progress& progress) {
    const bool first = !vision_loaded_;
    if (first)
      for (const auto& file : handle_.files()) file->require_unchanged();
    const GridTHW& grid = input.grid;
    Reporter reporter(progress);
    qwen2vl_error error{};
    const int status = input.pixel_values != nullptr
                           ? api().encode_vision(handle_.backend, input.pixel_values, grid.t, grid.h, grid.w,
                                                 out, reporter.get(), &error)
                           : api().encode_pixels(handle_.backend, input.pixels, input.levels, grid.h, grid.w,
                                                 out, reporter.get(), &error);
    reporter.check(status, error);
    vision_loaded_ = true;
    if (!first) return;
    handle_.release_pages();
    read_info();
  }

  const qwen2vl_backend_api& api() const { return handle_.api; }

  /// Kept, so that a look at it need not wait for a call that is being made.
  void read_info() {
    qwen2vl_info info{};
    api().info(handle_.backend, &info);
    const std::lock_guard lock(info_mutex_);
    info_ = info;
  }

  Handle handle_;
  PluginPages pages_;
  std::vector<qwen2vl_page_handle*> page_handles_;  // of the call at work
  bool has_vision_;
  bool vision_loaded_ = false;
  std::string device_;
  mutable std::mutex info_mutex_;
  qwen2vl_info info_{};
};

static_assert(sizeof(Position) == 3 * sizeof(int32_t), "positions go to plug-ins as [n][3]");
static_assert(static_cast<int>(LogitsWanted::None) == 0 && static_cast<int>(LogitsWanted::Last) == 1 &&
              static_cast<int>(LogitsWanted::All) == 2);

}  // namespace

std::unique_ptr<Backend> make_plugin_backend(const qwen2vl_backend_api& api, const ModelConfig& config,
                                             Weights&& weights, const PluginOptions& options,
                                             const Progress& progress) {
  return std::make_unique<PluginBackend>(api, config, std::move(weights), options, progress);
}

}  // namespace qwen2vl
