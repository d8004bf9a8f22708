// The plug-in's one export: model/backend_abi.h over the classes of this folder.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/language_model.h"
#include "cuda/limits.h"
#include "cuda/vision_encoder.h"
#include "model/backend_abi.h"

#ifdef _WIN32
#define QWEN2VL_EXPORT __declspec(dllexport)
#else
#define QWEN2VL_EXPORT __attribute__((visibility("default")))
#endif

using namespace qwen2vl;

struct qwen2vl_backend_handle {
  qwen2vl_backend_handle(const qwen2vl_model& model, const qwen2vl_options& options,
                         const cuda::Report& report)
      : exact(options.exact != 0),
        devices(options.device, options.more_devices != 0, options.memory_bytes),
        language_model(devices, model.text, exact, report) {
    if (model.vision != nullptr) vision = *model.vision;
  }

  bool exact;
  cuda::Devices devices;
  cuda::LanguageModel language_model;
  std::optional<qwen2vl_vision> vision;
  cuda::Context* vision_ctx = nullptr;  // where the tower is, from the first image on
  std::optional<cuda::VisionEncoder> vision_encoder;
};

namespace {

struct Cancelled {};

template <size_t n>
void copy_text(char (&to)[n], const std::string& text) {
  std::snprintf(to, n, "%s", text.c_str());
}

/// Runs fn; its exception becomes a status and a message.
template <typename Fn>
int guarded(qwen2vl_error* error, const Fn& fn) {
  const auto report = [&](int status, const char* message) {
    std::snprintf(error->message, sizeof error->message, "%s", message);
    return status;
  };
  try {
    fn();
    return QWEN2VL_OK;
  } catch (const Cancelled&) {
    return report(QWEN2VL_CANCELLED, "cancelled");
  } catch (const std::invalid_argument& e) {
    return report(QWEN2VL_INVALID, e.what());
  } catch (const UnsupportedError& e) {
    return report(QWEN2VL_UNSUPPORTED, e.what());
  } catch (const DeviceError& e) {
    return report(QWEN2VL_DEVICE, e.what());
  } catch (const std::exception& e) {
    return report(QWEN2VL_FAILED, e.what());
  }
}

template <typename Fn>
int on_device(qwen2vl_backend_handle* backend, qwen2vl_error* error, const Fn& fn) {
  return guarded(error, [&] {
    cuda::check(cudaSetDevice(backend->devices.first().device), "cudaSetDevice");  // the thread's
    fn();
  });
}

cuda::Report to_report(qwen2vl_progress progress) {
  return [progress](int64_t done, int64_t total) {
    if (progress.report != nullptr && progress.report(progress.context, done, total) != 0) throw Cancelled();
  };
}

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    (void)cudaGetLastError();
    int driver = 0, runtime = 0;
    (void)cudaDriverGetVersion(&driver);
    (void)cudaRuntimeGetVersion(&runtime);
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    throw DeviceError(driver == 0 ? "there is no NVIDIA driver on this machine"
                                  : "the NVIDIA driver is too old: it knows CUDA " + version(driver) +
                                        ", expected " + version(runtime / 1000 * 1000) + " or newer");
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    (void)cudaGetLastError();
    throw DeviceError("the NVIDIA driver finds no device");
  }
  cuda::check(status, "looking for devices");
  return count;
}

int devices(qwen2vl_device* out, int32_t capacity, int32_t* count, qwen2vl_error* error) {
  return guarded(error, [&] {
    *count = device_count();
    for (int i = 0; i < std::min<int>(capacity, *count); ++i) {
      cudaDeviceProp properties{};
      cuda::check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
      cuda::check(cudaSetDevice(i), "cudaSetDevice");
      size_t free = 0, total = 0;
      cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
      out[i] = {{},
                static_cast<int64_t>(total),
                static_cast<int64_t>(free),
                10 * properties.major + properties.minor,
                properties.multiProcessorCount};
      copy_text(out[i].name, properties.name);
    }
  });
}

int measure_limits(int32_t device, double seconds, qwen2vl_limits* out, qwen2vl_error* error) {
  return guarded(error, [&] { *out = cuda::measure_limits(device, seconds); });
}

int create(const qwen2vl_model* model, const qwen2vl_options* options, qwen2vl_progress progress,
           qwen2vl_backend_handle** out, qwen2vl_error* error) {
  return guarded(error, [&] {
    const int count = device_count();
    if (options->device < 0 || options->device >= count)
      throw DeviceError("there is no device " + std::to_string(options->device) + ": the driver finds " +
                        std::to_string(count));
    cudaDeviceProp properties{};
    cuda::check(cudaGetDeviceProperties(&properties, options->device), "cudaGetDeviceProperties");
    if (properties.major < cuda::kLeastMajor)
      throw DeviceError(std::string(properties.name) + " has compute capability " +
                        std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                        ", expected 8.0 or newer");
    *out = new qwen2vl_backend_handle(*model, *options, to_report(progress));
  });
}

void destroy(qwen2vl_backend_handle* backend) {
  (void)cudaSetDevice(backend->devices.first().device);
  delete backend;
}

void info(const qwen2vl_backend_handle* backend, qwen2vl_info* out) {
  *out = {};
  std::string names;
  int64_t bytes = 0, host_bytes = 0;
  const auto devices = backend->devices.opened();
  for (size_t i = 0; i < devices.size(); ++i) {
    bytes += devices[i]->weight_bytes();
    host_bytes += devices[i]->host_weight_bytes();
    const auto name = [&](size_t d) {
      const cudaDeviceProp& found = devices[d]->properties;
      return std::string(found.name) + ", sm_" + std::to_string(10 * found.major + found.minor);
    };
    size_t same = 1;
    while (i + same < devices.size() && name(i + same) == name(i)) ++same;
    if (i > 0 && name(i - 1) == name(i)) continue;
    names += (names.empty() ? "" : " and ") + (same > 1 ? std::to_string(same) + " x " : "") + name(i);
  }
  copy_text(out->device, names);
  if (host_bytes > 0)
    copy_text(out->note,
              std::string(devices.size() == 1 ? "the device's memory does" : "the devices' memories do") +
                  " not hold the whole model: " + std::to_string(host_bytes >> 20) + " of " +
                  std::to_string(bytes >> 20) +
                  " MiB of weights stay in the host's memory, from where they are read at every step");
  out->weight_bytes = bytes;
  out->max_batch_rows = cuda::kMaxBatchRows;
  out->page_cells = cuda::kPageCells;
  out->page_bytes = backend->language_model.page_bytes();
}

cuda::Page* page_of(qwen2vl_page_handle* handle) { return reinterpret_cast<cuda::Page*>(handle); }

int new_page(qwen2vl_backend_handle* backend, qwen2vl_page_handle** out, qwen2vl_error* error) {
  return on_device(backend, error, [&] {
    *out = reinterpret_cast<qwen2vl_page_handle*>(backend->language_model.new_page());
  });
}

void free_page(qwen2vl_backend_handle* backend, qwen2vl_page_handle* page) {
  backend->language_model.free_page(page_of(page));
}

int copy_page(qwen2vl_backend_handle* backend, const qwen2vl_page_handle* from, qwen2vl_page_handle* to,
              qwen2vl_error* error) {
  return on_device(backend, error, [&] {
    backend->language_model.copy_page(reinterpret_cast<const cuda::Page*>(from), page_of(to));
  });
}

int encode(qwen2vl_backend_handle* backend, const cuda::VisionInput& input, float* out,
           qwen2vl_progress progress, qwen2vl_error* error) {
  return on_device(backend, error, [&] {
    if (!backend->vision) throw std::invalid_argument("this model has no vision tower");
    const cuda::Report report = to_report(progress);
    if (backend->vision_ctx == nullptr) backend->vision_ctx = &backend->devices.roomiest();
    cuda::Context* ctx = backend->vision_ctx;
    cuda::check(cudaSetDevice(ctx->device), "cudaSetDevice");
    if (backend->vision_encoder) return (*backend->vision_encoder)(input, out, report);
    const auto part = [&](int64_t first) {
      return [&report, first](int64_t done, int64_t total) { report(first * total + done, 2 * total); };
    };
    backend->vision_encoder.emplace(*ctx, *backend->vision, backend->exact, part(0));
    (*backend->vision_encoder)(input, out, part(1));
  });
}

int encode_vision(qwen2vl_backend_handle* backend, const float* pixel_values, int64_t t, int64_t h, int64_t w,
                  float* out, qwen2vl_progress progress, qwen2vl_error* error) {
  return encode(backend, {{t, h, w}, pixel_values, nullptr, nullptr}, out, progress, error);
}

int encode_pixels(qwen2vl_backend_handle* backend, const uint8_t* pixels, const float* levels, int64_t h,
                  int64_t w, float* out, qwen2vl_progress progress, qwen2vl_error* error) {
  return encode(backend, {{1, h, w}, nullptr, pixels, levels}, out, progress, error);
}

int forward(qwen2vl_backend_handle* backend, const qwen2vl_rows* batch, int64_t n, float* logits,
            qwen2vl_progress progress, qwen2vl_error* error) {
  return on_device(backend, error, [&] {
    std::vector<cuda::SequenceRows> rows;
    for (const qwen2vl_rows& s : std::span(batch, static_cast<size_t>(n)))
      rows.push_back({{reinterpret_cast<cuda::Page* const*>(s.pages), static_cast<size_t>(s.n_pages)},
                      s.first_cell,
                      s.n,
                      s.token_ids,
                      s.embeddings,
                      s.positions,
                      s.logits});
    backend->language_model(rows, logits, to_report(progress));
  });
}

int likeliest(qwen2vl_backend_handle* backend, int64_t row, int32_t* token, qwen2vl_error* error) {
  return on_device(backend, error, [&] { *token = backend->language_model.likeliest(row); });
}

int kept_logits(qwen2vl_backend_handle* backend, int64_t row, float* out, qwen2vl_error* error) {
  return on_device(backend, error, [&] { backend->language_model.kept_logits(row, out); });
}

int start_profile(qwen2vl_backend_handle* backend, qwen2vl_error* error) {
  return on_device(backend, error, [&] {
    for (const auto& ctx : backend->devices.opened()) ctx->timer.start();
  });
}

int stop_profile(qwen2vl_backend_handle* backend, qwen2vl_stage* out, int32_t capacity, int32_t* count,
                 qwen2vl_error* error) {
  return on_device(backend, error, [&] {
    std::vector<StageRecord> records;
    for (const auto& ctx : backend->devices.opened()) {
      cuda::check(cudaSetDevice(ctx->device), "cudaSetDevice");
      for (StageRecord& record : ctx->timer.stop()) cuda::add_record(records, std::move(record));
    }
    *count = static_cast<int32_t>(records.size());
    for (int32_t i = 0; i < std::min(capacity, *count); ++i) {
      const StageRecord& r = records[static_cast<size_t>(i)];
      out[i] = {{}, r.calls, r.seconds, r.work.int8_ops, r.work.float_ops, r.work.bytes};
      copy_text(out[i].name, r.name);
    }
  });
}

int read_weights(qwen2vl_backend_handle* backend, int64_t* bytes, qwen2vl_error* error) {
  return on_device(backend, error, [&] { *bytes = backend->language_model.read_weights(); });
}

constexpr qwen2vl_backend_api kApi{QWEN2VL_BACKEND_ABI,
                                   sizeof(qwen2vl_backend_api),
                                   "cuda",
                                   devices,
                                   measure_limits,
                                   create,
                                   destroy,
                                   info,
                                   new_page,
                                   free_page,
                                   copy_page,
                                   encode_vision,
                                   encode_pixels,
                                   forward,
                                   likeliest,
                                   kept_logits,
                                   start_profile,
                                   stop_profile,
                                   read_weights};

}  // namespace

extern "C" QWEN2VL_EXPORT const qwen2vl_backend_api* qwen2vl_backend() { return &kApi; }
