#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/printable.h"
#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "engine/engine.h"

namespace qwen2vl::bindings {
namespace {

Precision to_precision(const std::string& name) {
  if (name == "fast") return Precision::Fast;
  if (name == "exact") return Precision::Exact;
  throw std::invalid_argument("precision: expected 'fast' or 'exact', found '" + printable(name) + "'");
}

// Of a matrix's update: more cost as much as the matrix itself.
constexpr int64_t kMostRanks = 1024;

/// None: empty.
std::filesystem::path optional_path(const py::object& value, const char* name) {
  return value.is_none() ? std::filesystem::path() : path(value, name);
}

py::dict read_config_of(const py::object& file, const py::object& mmproj, bool any_type) {
  const std::filesystem::path opened = path(file, "path"), tower = optional_path(mmproj, "mmproj");
  ModelConfig config;
  {
    py::gil_scoped_release release;
    config = open_model(opened, tower, {}, any_type ? Types::Any : Types::Computed).config;
  }
  return config_dict(config);
}

using Updates = std::vector<std::tuple<std::string, FloatArray, FloatArray>>;

/// Of (name, a [rank, cols], b [rows, rank]).
LowRankUpdates to_updates(const Updates& updates) {
  LowRankUpdates result;
  for (const auto& [name, a, b] : updates) {
    const int64_t rank = a.ndim() == 2 ? a.shape(0) : 0;
    require_shape(a, rank, a.ndim() == 2 ? a.shape(1) : 0, name);
    require_shape(b, b.ndim() == 2 ? b.shape(0) : 0, rank, name);
    if (rank == 0 || rank > kMostRanks)
      throw std::invalid_argument(printable(name) + ": expected a rank from 1 to " +
                                  std::to_string(kMostRanks) + ", found " + std::to_string(rank));
    LowRankUpdate update{rank, {a.data(), a.data() + a.size()}, {b.data(), b.data() + b.size()}};
    if (!result.try_emplace(name, std::move(update)).second)
      throw std::invalid_argument("update of " + printable(name) + ": given twice");
  }
  return result;
}

std::shared_ptr<Engine> load_model(const py::object& file, const py::object& mmproj,
                                   const py::object& n_threads, const py::str& precision, const py::str& isa,
                                   const PyProgress& progress, const py::str& device,
                                   const py::object& plugin, const py::object& device_memory,
                                   const Updates& updates) {
  const std::filesystem::path opened = path(file, "path");
  ModelOptions options{optional_path(mmproj, "mmproj"),
                       {text(device), to_precision(text(precision)), thread_count(n_threads), text(isa),
                        optional_path(plugin, "plugin"),
                        integer(device_memory, "device_memory", 0, std::numeric_limits<int64_t>::max())},
                       to_updates(updates)};
  const Progress report = make_progress(progress);
  py::gil_scoped_release release;
  return std::make_shared<Engine>(opened, std::move(options), report);
}

/// A figure that waits for its turn.
template <int64_t (Engine::*Figure)()>
int64_t without_gil(Engine& engine) {
  const py::gil_scoped_release release;
  return (engine.*Figure)();
}

py::list stop_profile(Engine& engine) {
  std::vector<StageRecord> records;
  {
    py::gil_scoped_release release;  // a call that holds the lock may be waiting for the GIL
    records = Engine::Turn(engine).backend.instruments().stop_profile();
  }
  py::list stages;
  for (const StageRecord& record : records) {
    py::dict stage;
    stage["name"] = record.name;
    stage["calls"] = record.calls;
    stage["seconds"] = record.seconds;
    stage["int8_ops"] = record.work.int8_ops;
    stage["float_ops"] = record.work.float_ops;
    stage["bytes"] = record.work.bytes;
    stages.append(stage);
  }
  return stages;
}

}  // namespace

void register_model(py::module_& m) {
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Model", "Weights on a backend.")
      .def(py::init(&load_model), py::arg("path"), py::arg("mmproj") = py::none(), py::arg("n_threads") = 0,
           py::arg("precision") = "fast", py::arg("isa") = "", py::arg("progress") = py::none(),
           py::arg("device") = "cpu", py::arg("plugin") = py::none(), py::arg("device_memory") = 0,
           py::arg("updates") = Updates{})
      .def_property_readonly("config", [](const Engine& engine) { return config_dict(engine.config()); })
      .def_property_readonly("device", [](const Engine& engine) { return engine.backend().device(); })
      .def_property_readonly("note", &Engine::note)
      .def_property_readonly("isa", [](const Engine& engine) { return std::string(engine.backend().isa()); })
      .def_property_readonly("n_threads", [](const Engine& engine) { return engine.backend().n_threads(); })
      .def_property_readonly(
          "precision",
          [](const Engine& engine) { return engine.precision() == Precision::Fast ? "fast" : "exact"; })
      .def_property_readonly("weight_bytes",
                             [](const Engine& engine) { return engine.backend().weight_bytes(); })
      .def(
          "start_profile", [](Engine& engine) { Engine::Turn(engine).backend.instruments().start_profile(); },
          py::call_guard<py::gil_scoped_release>())
      .def("stop_profile", &stop_profile)
      .def(
          "read_weights",
          [](Engine& engine) { return Engine::Turn(engine).backend.instruments().read_weights(); },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("can_guess", &Engine::can_guess)
      .def_property_readonly("max_batch_rows",
                             [](const Engine& engine) { return engine.backend().max_batch_rows(); })
      .def_property_readonly("cell_bytes", &Engine::cell_bytes)
      .def_property_readonly("cache_bytes", &Engine::cache_bytes)
      .def_property_readonly("idle_pages", &without_gil<&Engine::idle_pages>)
      .def(
          "limit_cache",
          [](Engine& engine, const py::object& bytes) {
            const int64_t most = integer(bytes, "bytes", 0, std::numeric_limits<int64_t>::max());
            const py::gil_scoped_release release;
            engine.set_cache_bytes(most);
          },
          py::arg("bytes"))
      .def("forget", &Engine::forget, py::call_guard<py::gil_scoped_release>());

  m.def("read_config", &read_config_of, py::arg("path"), py::arg("mmproj") = py::none(),
        py::arg("any_type") = false);
}

}  // namespace qwen2vl::bindings
