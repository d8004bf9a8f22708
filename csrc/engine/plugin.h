#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

#include "base/printable.h"
#include "model/backend_abi.h"

namespace qwen2vl {

/// What the library at `path` exports as a backend; it stays open for the process's life.
/// DeviceError, naming the file, where there is none, it is no library that can be loaded here, or no plug-in
/// of this version.
const qwen2vl_backend_api& open_plugin(const std::filesystem::path& path);

/// Devices that the plug-in finds; DeviceError, saying why, where there are none.
std::vector<qwen2vl_device> plugin_devices(const qwen2vl_backend_api& api);

/// What a device can do at most in a second; every loop takes `seconds`.
qwen2vl_limits measure_plugin_limits(const qwen2vl_backend_api& api, int device, double seconds);

/// What a plug-in wrote into a field of fixed size, fit for a message.
template <size_t n>
std::string plugin_text(const char (&field)[n]) {
  return printable({field, static_cast<size_t>(std::find(field, field + n, '\0') - field)}, n);
}

/// Throws what a call's status stands for, with the plug-in's message; nothing where it is QWEN2VL_OK.
void check_plugin(int status, const qwen2vl_error& error);

}  // namespace qwen2vl
