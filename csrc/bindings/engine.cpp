#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>

#include "base/call_lock.h"
#include "base/printable.h"
#include "bindings/arguments.h"
#include "bindings/bindings.h"

namespace qwen2vl::bindings {
namespace {

using FloatArray = py::array_t<float, py::array::c_style>;
using IdArray = py::array_t<int32_t, py::array::c_style>;
using GridTuple = std::tuple<py::object, py::object, py::object>;
// Positions are 32-bit; a model's own context is bounded alike (config.cpp).
constexpr int64_t kMostCells = int64_t{1} << 24;
using PyProgress = std::optional<py::function>;

/// Wraps a Python callback for a call that runs without the GIL: at most every 50 ms, and at the end, it
/// takes the GIL, lets pending signals raise (Ctrl-C) and reports. Any exception cancels the call.
Progress make_progress(const PyProgress& callback) {
  const py::function* function = callback ? &*callback : nullptr;
  auto last = std::chrono::steady_clock::now();
  return [function, last](int64_t done, int64_t total) mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(50) && !(function != nullptr && done == total)) return;
    last = now;
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (function != nullptr) (*function)(done, total);
  };
}

GridTHW to_grid(const GridTuple& grid) {
  const auto size = [](const py::object& value) { return integer(value, "grid_thw", 1, kMostPatches); };
  return {size(std::get<0>(grid)), size(std::get<1>(grid)), size(std::get<2>(grid))};
}

std::vector<int32_t> to_ids(const IdArray& ids) {
  if (ids.ndim() != 1) throw std::invalid_argument("token_ids: expected a one-dimensional array");
  return {ids.data(), ids.data() + ids.size()};
}

void require_shape(const FloatArray& array, int64_t rows, int64_t cols, const std::string& name) {
  if (array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == cols) return;
  std::string found = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) found += (i ? ", " : "") + std::to_string(array.shape(i));
  throw std::invalid_argument(name + ": expected shape (" + std::to_string(rows) + ", " +
                              std::to_string(cols) + "), found " + found + ")");
}

Precision to_precision(const std::string& name) {
  if (name == "fast") return Precision::Fast;
  if (name == "exact") return Precision::Exact;
  throw std::invalid_argument("precision: expected 'fast' or 'exact', found '" + printable(name) + "'");
}

/// None: empty.
std::filesystem::path optional_path(const py::object& value, const char* name) {
  return value.is_none() ? std::filesystem::path() : path(value, name);
}

py::dict read_config_of(const py::object& file, const py::object& mmproj) {
  const std::filesystem::path opened = path(file, "path"), tower = optional_path(mmproj, "mmproj");
  ModelConfig config;
  {
    py::gil_scoped_release release;
    config = open_model(opened, tower).config;
  }
  return config_dict(config);
}

std::shared_ptr<Engine> load_model(const py::object& file, const py::object& mmproj,
                                   const py::object& n_threads, const py::str& precision, const py::str& isa,
                                   const PyProgress& progress, const py::str& device,
                                   const py::object& plugin, const py::object& device_memory) {
  const std::filesystem::path opened = path(file, "path");
  const ModelOptions options{
      optional_path(mmproj, "mmproj"),
      {text(device), to_precision(text(precision)), thread_count(n_threads), text(isa),
       optional_path(plugin, "plugin"),
       integer(device_memory, "device_memory", 0, std::numeric_limits<int64_t>::max())}};
  require_device_name(options.backend.device);
  const Progress report = make_progress(progress);
  py::gil_scoped_release release;
  return std::make_shared<Engine>(opened, options, report);
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
    records = Engine::Turn(engine).backend.stop_profile();
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

FloatArray encode_image(Engine& engine, const FloatArray& pixel_values, const GridTuple& grid_thw,
                        const PyProgress& progress) {
  if (!engine.config().vision) throw std::invalid_argument("this model has no vision tower");
  const VisionConfig& vision = *engine.config().vision;
  const GridTHW grid = to_grid(grid_thw);
  const int64_t cells = vision_cells(grid, vision);
  require_shape(pixel_values, cells * vision.merge_unit(), vision.patch_dim(), "pixel_values");
  FloatArray out({cells, vision.hidden_size});
  const float* in = pixel_values.data();
  float* result = out.mutable_data();
  const Progress report = make_progress(progress);
  {
    py::gil_scoped_release release;
    Engine::Turn(engine).backend.encode_vision(in, grid, result, report);
  }
  return out;
}

using PixelArray = py::array_t<uint8_t, py::array::c_style>;

FloatArray encode_pixels(Engine& engine, const PixelArray& pixels, const FloatArray& levels,
                         const GridTuple& grid_thw, const PyProgress& progress) {
  if (!engine.config().vision) throw std::invalid_argument("this model has no vision tower");
  const VisionConfig& vision = *engine.config().vision;
  const GridTHW grid = to_grid(grid_thw);
  const int64_t cells = vision_cells(grid, vision), side = vision.patch_size;
  if (grid.t != 1)
    throw std::invalid_argument("grid_thw: expected one temporal step, found " + std::to_string(grid.t));
  require_shape(levels, vision.in_channels, 256, "levels");
  if (pixels.ndim() != 3 || pixels.shape(0) != grid.h * side || pixels.shape(1) != grid.w * side ||
      pixels.shape(2) != vision.in_channels)
    throw std::invalid_argument("pixels: expected shape (" + std::to_string(grid.h * side) + ", " +
                                std::to_string(grid.w * side) + ", " + std::to_string(vision.in_channels) +
                                ")");
  FloatArray out({cells, vision.hidden_size});
  float* result = out.mutable_data();
  const Progress report = make_progress(progress);
  {
    py::gil_scoped_release release;
    Engine::Turn(engine).backend.encode_pixels(pixels.data(), levels.data(), grid, result, report);
  }
  return out;
}

py::array_t<int64_t> position_ids(const Engine& engine, const IdArray& token_ids,
                                  const std::vector<GridTuple>& grids) {
  std::vector<GridTHW> sizes;
  for (const GridTuple& grid : grids) sizes.push_back(to_grid(grid));
  const auto positions = mrope_positions(to_ids(token_ids), sizes, engine.config());
  py::array_t<int64_t> out({py::ssize_t{3}, static_cast<py::ssize_t>(positions.size())});
  auto view = out.mutable_unchecked<2>();
  for (size_t i = 0; i < positions.size(); ++i)
    for (int axis = 0; axis < 3; ++axis) view(axis, static_cast<py::ssize_t>(i)) = positions[i][axis];
  return out;
}

Prompt make_prompt(const Engine& engine, const IdArray& token_ids,
                   const std::vector<std::tuple<py::object, GridTuple, py::bytes>>& images) {
  std::vector<PromptImage> items;
  for (const auto& [start, grid, key] : images) {
    const std::string_view bytes = key;
    PromptImage item{
        integer(start, "image start", 0, std::numeric_limits<int32_t>::max()), to_grid(grid), {}};
    if (bytes.size() != item.key.size())
      throw std::invalid_argument("image key: expected 16 bytes, found " + std::to_string(bytes.size()));
    std::copy(bytes.begin(), bytes.end(), item.key.begin());
    items.push_back(item);
  }
  return Prompt(engine.config(), to_ids(token_ids), std::move(items));
}

/// Addresses of the embeddings given, checked for shape.
std::vector<const float*> embedding_rows(const Engine& engine, const Prompt& prompt,
                                         const std::vector<std::optional<FloatArray>>& embeddings) {
  if (embeddings.size() != prompt.images().size())
    throw std::invalid_argument("embeddings: expected one entry for each of " +
                                std::to_string(prompt.images().size()) + " image(s), found " +
                                std::to_string(embeddings.size()));
  std::vector<const float*> rows;
  for (size_t i = 0; i < embeddings.size(); ++i) {
    if (embeddings[i])
      require_shape(*embeddings[i], prompt.image_cells(i), engine.config().text.hidden_size,
                    "embeddings[" + std::to_string(i) + "]");
    rows.push_back(embeddings[i] ? embeddings[i]->data() : nullptr);
  }
  return rows;
}

using AllowedArray = py::array_t<bool, py::array::c_style>;

/// A Sequence with the engine that it belongs to. Calls on it go one at a time.
class PySequence {
 public:
  PySequence(std::shared_ptr<Engine> engine, int64_t n_ctx) : engine_(std::move(engine)) {
    sequence_.n_ctx = n_ctx;
  }
  ~PySequence() { engine_->abandon(std::move(sequence_)); }
  PySequence(const PySequence&) = delete;
  PySequence& operator=(const PySequence&) = delete;

  int64_t n_ctx() const { return sequence_.n_ctx; }
  int64_t n_cells() {
    const auto mine = turn();
    return sequence_.size();
  }
  int64_t waiting() {
    const auto mine = turn();
    return sequence_.waiting();
  }
  int64_t kv_bytes() {
    const auto mine = turn();
    return engine_->bytes(sequence_);
  }

  int64_t reuse(const Prompt& prompt) {
    return call([&](Engine& engine, Sequence& s) { return engine.reuse(s, prompt); });
  }

  int64_t adopt(const Prompt& prompt) {
    return call([&](Engine& engine, Sequence& s) { return engine.adopt(s, prompt); });
  }

  void begin(const Prompt& prompt, std::vector<std::optional<FloatArray>> embeddings) {
    const auto rows = embedding_rows(*engine_, prompt, embeddings);
    const auto mine = turn();
    engine_->begin(sequence_, prompt, rows);
    embeddings_ = std::move(embeddings);
  }

  void push(const py::object& token) {
    const int32_t id = token_id(token);
    const auto mine = turn();
    engine_->push(sequence_, id);
  }

  void prefill(const Prompt& prompt, const std::vector<std::optional<FloatArray>>& embeddings,
               const PyProgress& progress) {
    evaluate(prompt, embeddings, progress, [](int64_t) { return nullptr; });
  }

  FloatArray prefill_logits(const Prompt& prompt, const std::vector<std::optional<FloatArray>>& embeddings,
                            const PyProgress& progress) {
    FloatArray out;
    evaluate(prompt, embeddings, progress, [&](int64_t rows) {
      out = FloatArray({rows, engine_->config().text.vocab_size});
      return out.mutable_data();
    });
    return out;
  }

  void accept(const py::object& token) {
    const int32_t id = token_id(token);
    const auto mine = turn();
    engine_->push(sequence_, id);
    const StepRows row{&sequence_};
    const Progress report = make_progress(std::nullopt);
    const py::gil_scoped_release release;
    try {
      engine_->step({&row, 1}, report);
    } catch (...) {
      sequence_.drop_waiting();
      throw;
    }
  }

  int32_t sample(Sampler& sampler, const std::optional<AllowedArray>& allowed) {
    static_assert(sizeof(bool) == 1);
    std::span<const uint8_t> mask;
    if (allowed) {
      if (allowed->ndim() != 1 || allowed->size() != engine_->config().text.vocab_size)
        throw std::invalid_argument("allowed: expected bool [" +
                                    std::to_string(engine_->config().text.vocab_size) + "]");
      mask = {reinterpret_cast<const uint8_t*>(allowed->data()), static_cast<size_t>(allowed->size())};
    }
    return call([&](Engine& engine, Sequence& s) { return engine.sample(s, sampler, mask); });
  }

  FloatArray logits() {
    const auto mine = turn();
    std::span<const float> values;
    {
      const py::gil_scoped_release release;  // they may have to come from a device that another call uses
      values = engine_->logits(sequence_);
    }
    if (values.empty()) throw std::invalid_argument("logits: nothing has been evaluated yet");
    return FloatArray(static_cast<py::ssize_t>(values.size()), values.data());
  }

  static void step(const std::vector<PySequence*>& states, const std::vector<int64_t>& rows,
                   const PyProgress& progress) {
    if (states.size() != rows.size())
      throw std::invalid_argument("step: expected rows for each of " + std::to_string(states.size()) +
                                  " sequences, found " + std::to_string(rows.size()));
    if (states.empty()) return;
    Engine& engine = engine_of(states);
    const auto mine = turns(states);
    std::vector<StepRows> batch;
    for (size_t i = 0; i < states.size(); ++i) batch.push_back({&states[i]->sequence_, rows[i]});
    const Progress report = make_progress(progress);
    {
      const py::gil_scoped_release release;
      engine.step(batch, report);
    }
    for (PySequence* state : states)
      if (state->sequence_.waiting() == 0) state->embeddings_.clear();
  }

 private:
  /// The engine knows which of them its model has.
  static int32_t token_id(const py::object& token) {
    return static_cast<int32_t>(integer(token, "token", 0, std::numeric_limits<int32_t>::max()));
  }

  static constexpr const char* kDifferent = "expected different sequences of one model";

  static Engine& engine_of(const std::vector<PySequence*>& states) {
    for (const PySequence* state : states) {
      if (state == nullptr) throw std::invalid_argument("expected sequences, found None");
      if (state->engine_ != states[0]->engine_) throw std::invalid_argument(kDifferent);
    }
    return *states[0]->engine_;
  }

  /// `out`(rows): where their logits go, or nullptr. Where it is stopped, whole steps stay.
  template <typename Out>
  void evaluate(const Prompt& prompt, const std::vector<std::optional<FloatArray>>& embeddings,
                const PyProgress& progress, const Out& out) {
    const auto rows = embedding_rows(*engine_, prompt, embeddings);
    const Progress report = make_progress(progress);
    const auto mine = turn();
    engine_->begin(sequence_, prompt, rows);
    float* all_logits = out(sequence_.waiting());
    const py::gil_scoped_release release;
    try {
      engine_->evaluate(sequence_, report, all_logits);
    } catch (...) {
      sequence_.drop_waiting();
      throw;
    }
  }

  /// The GIL is not kept while another call is waited for: that may be waiting for it.
  std::unique_lock<CallLock> turn() {
    std::unique_lock lock(call_lock_, std::try_to_lock);
    if (!lock) {
      const py::gil_scoped_release release;
      lock.lock();
    }
    return lock;
  }

  static std::vector<std::unique_lock<CallLock>> turns(const std::vector<PySequence*>& states) {
    std::vector<PySequence*> each(states);
    std::sort(each.begin(), each.end());  // in one order, whoever calls
    if (std::adjacent_find(each.begin(), each.end()) != each.end()) throw std::invalid_argument(kDifferent);
    std::vector<std::unique_lock<CallLock>> locks;
    for (PySequence* state : each) locks.push_back(state->turn());
    return locks;
  }

  /// fn(engine, sequence), without the GIL.
  template <typename Fn>
  std::invoke_result_t<const Fn&, Engine&, Sequence&> call(const Fn& fn) {
    const auto mine = turn();
    const py::gil_scoped_release release;
    return fn(*engine_, sequence_);
  }

  std::shared_ptr<Engine> engine_;
  Sequence sequence_;
  std::vector<std::optional<FloatArray>> embeddings_;  // of the cells that wait
  CallLock call_lock_;
};

}  // namespace

void register_engine(py::module_& m) {
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Model", "Weights on a backend.")
      .def(py::init(&load_model), py::arg("path"), py::arg("mmproj") = py::none(), py::arg("n_threads") = 0,
           py::arg("precision") = "fast", py::arg("isa") = "", py::arg("progress") = py::none(),
           py::arg("device") = "cpu", py::arg("plugin") = py::none(), py::arg("device_memory") = 0)
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
      .def("encode_image", &encode_image, py::arg("pixel_values"), py::arg("grid_thw"),
           py::arg("progress") = py::none())
      .def("encode_pixels", &encode_pixels, py::arg("pixels"), py::arg("levels"), py::arg("grid_thw"),
           py::arg("progress") = py::none())
      .def(
          "start_profile", [](Engine& engine) { Engine::Turn(engine).backend.start_profile(); },
          py::call_guard<py::gil_scoped_release>())
      .def("stop_profile", &stop_profile)
      .def(
          "read_weights", [](Engine& engine) { return Engine::Turn(engine).backend.read_weights(); },
          py::call_guard<py::gil_scoped_release>())
      .def("position_ids", &position_ids, py::arg("token_ids"), py::arg("grids"))
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

  py::class_<Prompt>(m, "Prompt", "Token ids with the vision items that stand in them.")
      .def(py::init(&make_prompt), py::arg("model"), py::arg("token_ids"), py::arg("images") = py::tuple())
      .def("__len__", &Prompt::size)
      .def("common_prefix", &Prompt::common_prefix, py::arg("other"));

  py::class_<Sampler>(m, "Sampler", "Draws tokens from logits.")
      .def(
          py::init([](const py::object& temperature, const py::object& top_k, const py::object& top_p,
                      const py::object& min_p, const py::object& repetition_penalty, const py::object& seed) {
            return Sampler({number(temperature, "temperature"),
                            integer(top_k, "top_k", 0, std::numeric_limits<int32_t>::max()),
                            number(top_p, "top_p"), number(min_p, "min_p"),
                            number(repetition_penalty, "repetition_penalty"),
                            unsigned_integer(seed, "seed")});
          }),
          py::arg("temperature") = 0.0f, py::arg("top_k") = 0, py::arg("top_p") = 1.0f,
          py::arg("min_p") = 0.0f, py::arg("repetition_penalty") = 1.0f, py::arg("seed") = 0);

  py::class_<PySequence>(m, "SequenceState", "One conversation's KV cache.")
      .def(py::init([](std::shared_ptr<Engine> engine, const py::object& n_ctx) {
             const int64_t cells = integer(n_ctx, "n_ctx", 1, kMostCells);
             return std::make_unique<PySequence>(std::move(engine), cells);
           }),
           py::arg("model"), py::arg("n_ctx"))
      .def_property_readonly("n_cells", &PySequence::n_cells)
      .def_property_readonly("n_ctx", &PySequence::n_ctx)
      .def_property_readonly("kv_bytes", &PySequence::kv_bytes)
      .def("reuse", &PySequence::reuse, py::arg("prompt"))
      .def("prefill", &PySequence::prefill, py::arg("prompt"), py::arg("embeddings"),
           py::arg("progress") = py::none())
      .def("prefill_logits", &PySequence::prefill_logits, py::arg("prompt"), py::arg("embeddings"),
           py::arg("progress") = py::none())
      .def_property_readonly("waiting", &PySequence::waiting)
      .def("adopt", &PySequence::adopt, py::arg("prompt"))
      .def("begin", &PySequence::begin, py::arg("prompt"), py::arg("embeddings"))
      .def("push", &PySequence::push, py::arg("token"))
      .def("accept", &PySequence::accept, py::arg("token"))
      .def_property_readonly("logits", &PySequence::logits)
      .def("sample", &PySequence::sample, py::arg("sampler"), py::arg("allowed") = py::none());
  m.def("read_config", &read_config_of, py::arg("path"), py::arg("mmproj") = py::none());
  m.def("step", &PySequence::step, py::arg("states"), py::arg("rows"), py::arg("progress") = py::none());
}

}  // namespace qwen2vl::bindings
