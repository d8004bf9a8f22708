#include "engine/backend_registry.h"

#include <charconv>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/printable.h"
#include "cpu/backend.h"
#include "engine/plugin.h"
#include "engine/plugin_backend.h"

namespace qwen2vl {
namespace {

struct DeviceName {
  enum class Kind { Cpu, Cuda, Auto } kind;
  int32_t index = 0;
};

std::optional<DeviceName> parse(std::string_view name) {
  if (name == "cpu") return DeviceName{DeviceName::Kind::Cpu};
  if (name == "auto") return DeviceName{DeviceName::Kind::Auto};
  if (name == "cuda") return DeviceName{DeviceName::Kind::Cuda};
  constexpr std::string_view kNumbered = "cuda:";
  if (!name.starts_with(kNumbered)) return std::nullopt;
  name.remove_prefix(kNumbered.size());
  int32_t index = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), index);
  if (error != std::errc() || end != name.data() + name.size() || index < 0) return std::nullopt;
  return DeviceName{DeviceName::Kind::Cuda, index};
}

DeviceName require_parsed(const std::string& name) {
  const std::optional<DeviceName> parsed = parse(name);
  if (!parsed)
    throw std::invalid_argument(
        "device: expected cpu, cuda, cuda:N (its N-th device, from 0) or auto, found '" + printable(name) +
        "'");
  return *parsed;
}

std::unique_ptr<Backend> make_cuda_backend(const ModelConfig& config, Weights&& weights, int32_t index,
                                           const BackendOptions& options, const Progress& progress) {
  if (options.plugin.empty())
    throw DeviceError("device cuda: its plug-in is not installed; pip install qwen2vl-q-cuda brings it");
  const qwen2vl_backend_api& api = open_plugin(options.plugin);
  std::vector<qwen2vl_device> devices;
  try {
    devices = plugin_devices(api);
  } catch (const DeviceError& error) {
    throw DeviceError(std::string("device cuda: ") + error.what());
  }
  if (static_cast<size_t>(index) >= devices.size()) {
    std::string there;
    for (size_t i = 0; i < devices.size(); ++i)
      there += (i ? ", cuda:" : "cuda:") + std::to_string(i) + " (" + plugin_text(devices[i].name) + ")";
    throw DeviceError("device cuda:" + std::to_string(index) + ": there is no such device, only " + there);
  }
  return make_plugin_backend(api, config, std::move(weights),
                             {index, options.precision, options.device_memory}, progress);
}

}  // namespace

void require_device_name(const std::string& device) { require_parsed(device); }

ChosenBackend make_backend(const ModelConfig& config, Weights weights, const BackendOptions& options,
                           const Progress& progress) {
  const DeviceName device = require_parsed(options.device);
  ChosenBackend chosen;
  if (device.kind == DeviceName::Kind::Cuda) {
    chosen.backend = make_cuda_backend(config, std::move(weights), device.index, options, progress);
  } else if (device.kind == DeviceName::Kind::Auto && !options.plugin.empty()) {
    try {
      chosen.backend = make_cuda_backend(config, std::move(weights), device.index, options, progress);
    } catch (const DeviceError& error) {
      chosen.note = std::string("computing on the CPU: ") + error.what();
    }
  }
  if (!chosen.backend)  // whoever failed above has left the weights alone
    chosen.backend = cpu::make_cpu_backend(config, std::move(weights),
                                           {options.n_threads, options.precision, options.isa}, progress);
  return chosen;
}

}  // namespace qwen2vl
