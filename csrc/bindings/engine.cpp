#include <chrono>
#include <limits>
#include <mutex>
#include <optional>
#include <set>
#include <type_traits>

#include "base/call_lock.h"
#include "base/printable.h"
#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "engine/sequence.h"

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

std::shared_ptr<Model> load_model(const py::object& file, const py::object& mmproj,
                                  const py::object& n_threads, const py::str& precision, const py::str& isa,
                                  const PyProgress& progress, const py::str& device, const py::object& plugin,
                                  const py::object& device_memory) {
  const std::filesystem::path opened = path(file, "path");
  const ModelOptions options{
      optional_path(mmproj, "mmproj"),
      {text(device), to_precision(text(precision)), thread_count(n_threads), text(isa),
       optional_path(plugin, "plugin"),
       integer(device_memory, "device_memory", 0, std::numeric_limits<int64_t>::max())}};
  require_device_name(options.backend.device);
  const Progress report = make_progress(progress);
  py::gil_scoped_release release;
  return std::make_shared<Model>(opened, options, report);
}

py::list stop_profile(Model& model) {
  std::vector<StageRecord> records;
  {
    py::gil_scoped_release release;  // a call that holds the lock may be waiting for the GIL
    records = model.lock().backend.stop_profile();
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

FloatArray encode_image(Model& model, const FloatArray& pixel_values, const GridTuple& grid_thw,
                        const PyProgress& progress) {
  if (!model.config().vision) throw std::invalid_argument("this model has no vision tower");
  const VisionConfig& vision = *model.config().vision;
  const GridTHW grid = to_grid(grid_thw);
  const int64_t cells = vision_cells(grid, vision);
  require_shape(pixel_values, cells * vision.merge_unit(), vision.patch_dim(), "pixel_values");
  FloatArray out({cells, vision.hidden_size});
  const float* in = pixel_values.data();
  float* result = out.mutable_data();
  const Progress report = make_progress(progress);
  {
    py::gil_scoped_release release;
    model.lock().backend.encode_vision(in, grid, result, report);
  }
  return out;
}

using PixelArray = py::array_t<uint8_t, py::array::c_style>;

FloatArray encode_pixels(Model& model, const PixelArray& pixels, const FloatArray& levels,
                         const GridTuple& grid_thw, const PyProgress& progress) {
  if (!model.config().vision) throw std::invalid_argument("this model has no vision tower");
  const VisionConfig& vision = *model.config().vision;
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
    model.lock().backend.encode_pixels(pixels.data(), levels.data(), grid, result, report);
  }
  return out;
}

py::array_t<int64_t> position_ids(const Model& model, const IdArray& token_ids,
                                  const std::vector<GridTuple>& grids) {
  std::vector<GridTHW> sizes;
  for (const GridTuple& grid : grids) sizes.push_back(to_grid(grid));
  const auto positions = mrope_positions(to_ids(token_ids), sizes, model.config());
  py::array_t<int64_t> out({py::ssize_t{3}, static_cast<py::ssize_t>(positions.size())});
  auto view = out.mutable_unchecked<2>();
  for (size_t i = 0; i < positions.size(); ++i)
    for (int axis = 0; axis < 3; ++axis) view(axis, static_cast<py::ssize_t>(i)) = positions[i][axis];
  return out;
}

Prompt make_prompt(const Model& model, const IdArray& token_ids,
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
  return Prompt(model.config(), to_ids(token_ids), std::move(items));
}

/// Addresses of the embeddings given, checked for shape.
std::vector<const float*> embedding_rows(const Model& model, const Prompt& prompt,
                                         const std::vector<std::optional<FloatArray>>& embeddings) {
  if (embeddings.size() != prompt.images().size())
    throw std::invalid_argument("embeddings: expected one entry for each of " +
                                std::to_string(prompt.images().size()) + " image(s), found " +
                                std::to_string(embeddings.size()));
  std::vector<const float*> rows;
  for (size_t i = 0; i < embeddings.size(); ++i) {
    if (embeddings[i])
      require_shape(*embeddings[i], prompt.image_cells(i), model.config().text.hidden_size,
                    "embeddings[" + std::to_string(i) + "]");
    rows.push_back(embeddings[i] ? embeddings[i]->data() : nullptr);
  }
  return rows;
}

/// A Sequence with the model that it belongs to. Calls on it go one at a time.
class PySequence {
 public:
  PySequence(std::shared_ptr<Model> model, int64_t n_ctx)
      : model_(std::move(model)), sequence_(model_, n_ctx) {}

  int64_t n_ctx() const { return sequence_.n_ctx(); }
  int64_t n_cells() {
    const auto mine = turn();
    return sequence_.size();
  }
  int64_t kv_bytes() {
    const auto mine = turn();
    return sequence_.kv_bytes();
  }

  int64_t reuse(const Prompt& prompt) {
    return call([&](Sequence& s) { return s.reuse(prompt); });
  }

  void prefill(const Prompt& prompt, const std::vector<std::optional<FloatArray>>& embeddings,
               const PyProgress& progress) {
    const auto rows = embedding_rows(*model_, prompt, embeddings);
    const Progress report = make_progress(progress);
    call([&](Sequence& s) { s.prefill(prompt, rows, report); });
  }

  FloatArray prefill_logits(const Prompt& prompt, const std::vector<std::optional<FloatArray>>& embeddings,
                            const PyProgress& progress) {
    const auto rows = embedding_rows(*model_, prompt, embeddings);
    const Progress report = make_progress(progress);
    const auto mine = turn();
    const int64_t n = std::max<int64_t>(0, prompt.size() - sequence_.size());
    FloatArray out({n, model_->config().text.vocab_size});
    float* data = out.mutable_data();
    {
      const py::gil_scoped_release release;
      sequence_.prefill(prompt, rows, report, LogitsWanted::All, data);
    }
    return out;
  }

  void accept(const py::object& token) {
    const int32_t id = token_id(token);
    const Progress report = make_progress(std::nullopt);
    call([&](Sequence& s) { s.accept(id, report); });
  }

  int32_t sample(Sampler& sampler) {
    return call([&](Sequence& s) { return s.sample(sampler); });
  }

  FloatArray logits() {
    const auto mine = turn();
    std::span<const float> values;
    {
      const py::gil_scoped_release release;  // they may have to come from a device that another call uses
      values = sequence_.logits();
    }
    if (values.empty()) throw std::invalid_argument("logits: nothing has been evaluated yet");
    return FloatArray(static_cast<py::ssize_t>(values.size()), values.data());
  }

  static void accept_together(const std::vector<PySequence*>& states, const std::vector<py::object>& tokens) {
    std::vector<Sequence*> sequences;
    for (PySequence* state : states) {
      if (state == nullptr) throw std::invalid_argument("accept_together: expected sequences, found None");
      sequences.push_back(&state->sequence_);
    }
    std::vector<int32_t> ids;
    for (size_t i = 0; i < tokens.size(); ++i) ids.push_back(token_id(tokens[i]));
    std::set<PySequence*> each(states.begin(), states.end());  // in one order, whoever calls
    std::vector<std::unique_lock<CallLock>> mine;
    for (PySequence* state : each) mine.push_back(state->turn());
    const Progress report = make_progress(std::nullopt);
    const py::gil_scoped_release release;
    Sequence::accept_together(sequences, ids, report);
  }

 private:
  /// Sequence knows which of them its model has.
  static int32_t token_id(const py::object& token) {
    return static_cast<int32_t>(integer(token, "token", 0, std::numeric_limits<int32_t>::max()));
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

  /// fn(sequence), without the GIL.
  template <typename Fn>
  std::invoke_result_t<const Fn&, Sequence&> call(const Fn& fn) {
    const auto mine = turn();
    const py::gil_scoped_release release;
    return fn(sequence_);
  }

  std::shared_ptr<Model> model_;
  Sequence sequence_;
  CallLock call_lock_;
};

}  // namespace

void register_engine(py::module_& m) {
  py::class_<Model, std::shared_ptr<Model>>(m, "Model", "Weights on a backend.")
      .def(py::init(&load_model), py::arg("path"), py::arg("mmproj") = py::none(), py::arg("n_threads") = 0,
           py::arg("precision") = "fast", py::arg("isa") = "", py::arg("progress") = py::none(),
           py::arg("device") = "cpu", py::arg("plugin") = py::none(), py::arg("device_memory") = 0)
      .def_property_readonly("config", [](const Model& model) { return config_dict(model.config()); })
      .def_property_readonly("device", [](const Model& model) { return model.backend().device(); })
      .def_property_readonly("note", &Model::note)
      .def_property_readonly("isa", [](const Model& model) { return std::string(model.backend().isa()); })
      .def_property_readonly("n_threads", [](const Model& model) { return model.backend().n_threads(); })
      .def_property_readonly(
          "precision",
          [](const Model& model) { return model.precision() == Precision::Fast ? "fast" : "exact"; })
      .def_property_readonly("weight_bytes",
                             [](const Model& model) { return model.backend().weight_bytes(); })
      .def("encode_image", &encode_image, py::arg("pixel_values"), py::arg("grid_thw"),
           py::arg("progress") = py::none())
      .def("encode_pixels", &encode_pixels, py::arg("pixels"), py::arg("levels"), py::arg("grid_thw"),
           py::arg("progress") = py::none())
      .def(
          "start_profile", [](Model& model) { model.lock().backend.start_profile(); },
          py::call_guard<py::gil_scoped_release>())
      .def("stop_profile", &stop_profile)
      .def(
          "read_weights", [](Model& model) { return model.lock().backend.read_weights(); },
          py::call_guard<py::gil_scoped_release>())
      .def("position_ids", &position_ids, py::arg("token_ids"), py::arg("grids"));

  py::class_<Prompt>(m, "Prompt", "Token ids with the vision items that stand in them.")
      .def(py::init(&make_prompt), py::arg("model"), py::arg("token_ids"), py::arg("images") = py::tuple())
      .def("__len__", &Prompt::size);

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
      .def(py::init([](std::shared_ptr<Model> model, const py::object& n_ctx) {
             const int64_t cells = integer(n_ctx, "n_ctx", 1, kMostCells);
             const py::gil_scoped_release release;
             return std::make_unique<PySequence>(std::move(model), cells);
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
      .def("accept", &PySequence::accept, py::arg("token"))
      .def_property_readonly("logits", &PySequence::logits)
      .def("sample", &PySequence::sample, py::arg("sampler"));
  m.def("read_config", &read_config_of, py::arg("path"), py::arg("mmproj") = py::none());
  m.def("accept_together", &PySequence::accept_together, py::arg("states"), py::arg("tokens"));
}

}  // namespace qwen2vl::bindings
