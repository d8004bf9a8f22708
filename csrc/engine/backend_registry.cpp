#include "engine/backend_registry.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/printable.h"
#include "cpu/backend.h"
#include "engine/plugin.h"
#include "engine/plugin_backend.h"

namespace qwen2vl {
namespace {

constexpr std::string_view kCpu = "cpu", kAuto = "auto";
constexpr std::string_view kNoAdapters =
    ": adapters are computed on the CPU alone; qwen2vl-q convert --lora merges them";
constexpr size_t kMostOfAName = 32;

/// "cuda:1" as name and index, "cuda" as a name; nothing where it is neither.
std::optional<std::pair<std::string, std::optional<int32_t>>> parse(std::string_view device) {
  const size_t colon = device.find(':');
  const std::string_view name = device.substr(0, colon);
  const bool named = !name.empty() && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
  });
  std::optional<int32_t> index;
  if (colon != std::string_view::npos) {
    const char *first = device.data() + colon + 1, *last = device.data() + device.size();
    const auto [end, error] = std::from_chars(first, last, index.emplace());
    if (error != std::errc() || end != last || *index < 0 || name == kCpu || name == kAuto)
      return std::nullopt;
  }
  if (!named) return std::nullopt;
  return std::pair(std::string(name), index);
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

/// The devices of a plug-in's backend; DeviceError, with its name, where there is none of that index.
void require_device(const qwen2vl_backend_api& api, const std::string& name, int32_t index) {
  std::vector<std::string> there;
  try {
    for (const qwen2vl_device& device : plugin_devices(api))
      there.push_back(name + ":" + std::to_string(there.size()) + " (" + plugin_text(device.name) + ")");
  } catch (const DeviceError& error) {
    throw DeviceError("device " + name + ": " + error.what());
  }
  if (static_cast<size_t>(index) >= there.size())
    throw DeviceError("device " + name + ":" + std::to_string(index) + ": there is no such device, only " +
                      listed(there));
}

}  // namespace

BackendRegistry::BackendRegistry(BackendOptions options) : options_(std::move(options)) {
  const auto asked = parse(options_.device);
  if (!asked)
    throw std::invalid_argument(
        "device: expected a backend's name, one with a device's index (cuda:1) or auto, found '" +
        printable(options_.device) + "'");
  std::tie(name_, index_) = *asked;
  factories_[std::string(kCpu)] = [this](const ModelConfig& config, Weights&& weights,
                                         const Progress& progress) {
    return cpu::make_cpu_backend(config, std::move(weights),
                                 {options_.n_threads, options_.precision, options_.isa}, progress);
  };
  if (name_ == kCpu) return;
  try {
    if (!options_.plugin.empty()) add_plugin();
  } catch (const DeviceError& error) {
    if (name_ != kAuto) throw;
    note_ = std::string("computing on the CPU: ") + error.what();
  }
  if (name_ == kAuto || factories_.contains(name_)) return;
  std::vector<std::string> names;
  for (const auto& [name, factory] : factories_) names.push_back(name);
  throw DeviceError("device " + name_ + ": there is no such backend, only " + listed(names));
}

/// Under the name that it gives itself.
void BackendRegistry::add_plugin() {
  const qwen2vl_backend_api& api = open_plugin(options_.plugin);
  const std::string name = printable(api.name, kMostOfAName);
  factories_.try_emplace(
      name, [this, &api, name](const ModelConfig& config, Weights&& weights, const Progress& progress) {
        if (weights.is_updated) throw UnsupportedError("device " + name + std::string(kNoAdapters));
        require_device(api, name, index_.value_or(0));
        return make_plugin_backend(api, config, std::move(weights),
                                   {index_.value_or(0), !index_, options_.precision, options_.device_memory},
                                   progress);
      });
}

ChosenBackend BackendRegistry::make(const ModelConfig& config, Weights weights,
                                    const Progress& progress) const {
  if (name_ != kAuto) return {factories_.find(name_)->second(config, std::move(weights), progress), {}};
  std::string note = note_;
  for (const auto& [name, factory] : factories_) {
    if (name == kCpu) continue;
    if (weights.is_updated) {
      note = "computing on the CPU: device " + name + std::string(kNoAdapters);
      continue;
    }
    try {
      return {factory(config, std::move(weights), progress), {}};
    } catch (const DeviceError& error) {
      note = std::string("computing on the CPU: ") + error.what();
    }
  }
  return {factories_.find(kCpu)->second(config, std::move(weights), progress), note};
}

}  // namespace qwen2vl
