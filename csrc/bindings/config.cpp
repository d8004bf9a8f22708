#include "model/config.h"

#include <array>
#include <optional>
#include <type_traits>

#include "bindings/bindings.h"

namespace qwen2vl::bindings {
namespace {

template <size_t N>
py::object to_python(const std::array<int64_t, N>& values) {
  py::tuple tuple(N);
  for (size_t i = 0; i < N; ++i) tuple[i] = values[i];
  return tuple;
}

template <typename T>
py::object to_python(const std::optional<T>& value);

/// A config as a dict of its fields, in their order; numbers as they are.
template <typename T>
py::object to_python(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return py::cast(value);
  } else {
    py::dict fields;
    visit_fields(value, [&](const char* name, const auto& member, const ConfigKey&) {
      fields[name] = to_python(member);
    });
    return fields;
  }
}

template <typename T>
py::object to_python(const std::optional<T>& value) {
  return value ? to_python(*value) : py::none();
}

}  // namespace

py::dict config_dict(const ModelConfig& config) { return to_python(config); }

}  // namespace qwen2vl::bindings
