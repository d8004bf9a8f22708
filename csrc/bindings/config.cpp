#include "model/config.h"

#include <array>
#include <optional>
#include <type_traits>

#include "bindings/bindings.h"
#include "model/architecture.h"

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

void register_config(py::module_& m) {
  m.def("require_language_model", &require_language_model, py::arg("file"));
  m.def("has_vision_tower", &has_vision_tower, py::arg("file"));
  m.def("require_vision_tower", &require_vision_tower, py::arg("file"));
  m.def("vision_tower_width", &vision_tower_width, py::arg("file"));
  m.def("has_swapped_feed_forward", &has_swapped_feed_forward, py::arg("file"));
}

}  // namespace qwen2vl::bindings
