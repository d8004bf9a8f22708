#include "engine/plugin.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include "base/error.h"
#include "base/printable.h"

#ifdef _WIN32
#include <windows.h>

#include <system_error>
#else
#include <dlfcn.h>
#endif

namespace qwen2vl {
namespace {

// A library whose static objects may have threads and device contexts behind them is never closed.
#ifdef _WIN32

void* open_library(const std::filesystem::path& path, std::string& why) {
  const HMODULE library = LoadLibraryW(path.c_str());
  if (library == nullptr) why = std::system_category().message(static_cast<int>(GetLastError()));
  return library;
}

void* find_symbol(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}

#else

void* open_library(const std::filesystem::path& path, std::string& why) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) why = dlerror();
  return library;
}

void* find_symbol(void* library, const char* name) { return dlsym(library, name); }

#endif

}  // namespace

const qwen2vl_backend_api& open_plugin(const std::filesystem::path& path) {
  const std::string name = printable_path(path);
  // Absolute, so that the loader does not search its own folders for a bare name.
  std::error_code ignored;
  const std::filesystem::path file = std::filesystem::absolute(path, ignored);
  if (!std::filesystem::is_regular_file(file, ignored))
    throw DeviceError(name + ": expected a plug-in library, found no such file");
  std::string why;
  void* library = open_library(file, why);
  if (library == nullptr)
    throw DeviceError(name + ": cannot be loaded: " + printable(why, sizeof qwen2vl_error::message));
  const auto function =
      reinterpret_cast<qwen2vl_backend_function>(find_symbol(library, QWEN2VL_BACKEND_SYMBOL));
  if (function == nullptr)
    throw DeviceError(name + ": not a plug-in: it exports no " + QWEN2VL_BACKEND_SYMBOL);
  const qwen2vl_backend_api* api = function();
  if (api == nullptr || api->abi != QWEN2VL_BACKEND_ABI || api->size < sizeof(qwen2vl_backend_api))
    throw DeviceError(
        name + ": a plug-in for another version of qwen2vl-q: expected interface " +
        std::to_string(QWEN2VL_BACKEND_ABI) + " of " + std::to_string(sizeof(qwen2vl_backend_api)) +
        " bytes, found " +
        (api == nullptr ? "none" : std::to_string(api->abi) + " of " + std::to_string(api->size)));
  return *api;
}

std::vector<qwen2vl_device> plugin_devices(const qwen2vl_backend_api& api) {
  constexpr int32_t kMost = 64;  // devices: far more than a machine has
  std::vector<qwen2vl_device> devices(kMost);
  int32_t count = 0;
  qwen2vl_error error{};
  check_plugin(api.devices(devices.data(), kMost, &count, &error), error);
  devices.resize(std::clamp(count, 0, kMost));
  if (devices.empty()) throw DeviceError("no device was found");
  return devices;
}

qwen2vl_limits measure_plugin_limits(const qwen2vl_backend_api& api, int device, double seconds) {
  qwen2vl_limits limits{};
  qwen2vl_error error{};
  check_plugin(api.measure_limits(device, seconds, &limits, &error), error);
  return limits;
}

void check_plugin(int status, const qwen2vl_error& error) {
  if (status == QWEN2VL_OK) return;
  const std::string message = plugin_text(error.message);
  switch (status) {
    case QWEN2VL_INVALID:
      throw std::invalid_argument(message);
    case QWEN2VL_UNSUPPORTED:
      throw UnsupportedError(message);
    case QWEN2VL_DEVICE:
      throw DeviceError(message);
    default:
      throw Error(message);
  }
}

}  // namespace qwen2vl
