#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>

#include "base/call_lock.h"
#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "engine/engine.h"
#include "engine/prompt_lookup.h"

namespace qwen2vl::bindings {
namespace {

// Positions are 32-bit; a model's own context is bounded alike (config.cpp).
constexpr int64_t kMostCells = int64_t{1} << 24;

/// "float32 [3, 4]"
std::string described(const py::array& array) {
  return text(py::str(array.dtype())) + " " + text(py::str(py::list(array.attr("shape"))));
}

/// As numpy sees them; the prompt knows which of them its model has.
py::array_t<int64_t> to_ids(const py::object& token_ids) {
  const py::array ids = py::array::ensure(token_ids);
  if (!ids) throw py::error_already_set();
  const char kind = ids.dtype().kind();
  if (ids.ndim() != 1 || (kind != 'i' && kind != 'u'))
    throw std::invalid_argument("token_ids: expected integers [n], n > 0, found " + described(ids));
  return py::array_t<int64_t, py::array::c_style | py::array::forcecast>(ids);
}

Prompt make_prompt(const Engine& engine, const py::object& token_ids,
                   const std::vector<std::tuple<GridTuple, py::bytes>>& images, const py::object& n_ctx) {
  std::vector<PromptImage> items;
  for (const auto& [grid, key] : images) {
    const std::string_view bytes = key;
    PromptImage& item = items.emplace_back(PromptImage{to_grid(grid), {}});
    if (bytes.size() != item.key.size())
      throw std::invalid_argument("image key: expected 16 bytes, found " + std::to_string(bytes.size()));
    std::copy(bytes.begin(), bytes.end(), item.key.begin());
  }
  const py::array_t<int64_t> ids = to_ids(token_ids);
  return Prompt(engine.config(), {ids.data(), static_cast<size_t>(ids.size())}, items,
                integer(n_ctx, "n_ctx", 1, kMostCells));
}

py::array_t<int64_t> positions(const Prompt& prompt) {
  py::array_t<int64_t> out({py::ssize_t{3}, static_cast<py::ssize_t>(prompt.size())});
  auto view = out.mutable_unchecked<2>();
  for (int64_t i = 0; i < prompt.size(); ++i)
    for (int axis = 0; axis < 3; ++axis) view(axis, i) = prompt.positions()[i][axis];
  return out;
}

std::vector<std::tuple<int64_t, int64_t>> runs(const Prompt& prompt) {
  std::vector<std::tuple<int64_t, int64_t>> found;
  for (const VisionItem& item : prompt.items()) found.emplace_back(item.start, item.end);
  return found;
}

/// pybind11 knows no pointers to const.
using EmbeddingsList = std::vector<std::shared_ptr<Embeddings>>;

std::vector<std::shared_ptr<const Embeddings>> shared(const EmbeddingsList& embeddings) {
  return {embeddings.begin(), embeddings.end()};
}

/// Bytes, 0 for tokens that must not be drawn.
py::array_t<uint8_t> to_mask(const py::array& allowed, int64_t vocab_size) {
  const char kind = allowed.dtype().kind();
  if (allowed.ndim() != 1 || allowed.size() != vocab_size || allowed.itemsize() != 1 ||
      (kind != 'b' && kind != 'u'))
    throw std::invalid_argument("allowed: expected bool or uint8 [" + std::to_string(vocab_size) +
                                "], found " + described(allowed));
  return py::array_t<uint8_t, py::array::c_style>(allowed.attr("view")("uint8"));
}

Sampler make_sampler(const py::object& temperature, const py::object& top_k, const py::object& top_p,
                     const py::object& min_p, const py::object& repetition_penalty,
                     const py::object& presence_penalty, const py::object& frequency_penalty,
                     const py::object& no_repeat_ngram_size, const py::dict& logit_bias,
                     const py::object& seed) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  SamplingParams params;
  params.temperature = number(temperature, "temperature");
  params.top_k = integer(top_k, "top_k", 0, kMost);
  params.top_p = number(top_p, "top_p");
  params.min_p = number(min_p, "min_p");
  params.repetition_penalty = number(repetition_penalty, "repetition_penalty");
  params.presence_penalty = number(presence_penalty, "presence_penalty");
  params.frequency_penalty = number(frequency_penalty, "frequency_penalty");
  params.no_repeat_ngram_size = integer(no_repeat_ngram_size, "no_repeat_ngram_size", 0, kMost);
  for (const auto& [token, bias] : logit_bias)
    params.logit_bias.push_back(
        {static_cast<int32_t>(integer(token, "logit_bias", 0, kMost)), number(bias, "logit_bias")});
  params.seed = unsigned_integer(seed, "seed");
  return Sampler(params);
}

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

  void begin(const Prompt& prompt, const EmbeddingsList& embeddings) {
    const auto mine = turn();
    engine_->begin(sequence_, prompt, shared(embeddings));
  }

  void push(const py::object& token) {
    const int32_t id = token_id(token);
    call([&](Engine& engine, Sequence& s) { engine.push(s, id); });
  }

  std::vector<int32_t> look_up(const py::object& most) {
    const int64_t n = integer(most, "most", 0, kMostCells);
    return call([&](Engine&, Sequence& s) { return qwen2vl::look_up(s.known_tokens(), n); });
  }

  int64_t guess(const std::vector<int32_t>& tokens) {
    const auto mine = turn();
    return engine_->guess(sequence_, tokens);
  }

  void prefill(const Prompt& prompt, const EmbeddingsList& embeddings, const PyProgress& progress) {
    evaluate(prompt, embeddings, progress, [](int64_t) { return nullptr; });
  }

  FloatArray prefill_logits(const Prompt& prompt, const EmbeddingsList& embeddings,
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
    const Progress report = make_progress(std::nullopt);
    const py::gil_scoped_release release;
    engine_->push(sequence_, id);
    if (sequence_.waiting() == 0) return;  // it had been guessed
    const StepRows row{&sequence_};
    try {
      engine_->step({&row, 1}, report);
    } catch (...) {
      sequence_.drop_waiting();
      throw;
    }
  }

  int32_t sample(Sampler& sampler, const std::optional<py::array>& allowed) {
    py::array_t<uint8_t> bytes;
    std::span<const uint8_t> mask;
    if (allowed) {
      bytes = to_mask(*allowed, engine_->config().text.vocab_size);
      mask = {bytes.data(), static_cast<size_t>(bytes.size())};
    }
    return call([&](Engine& engine, Sequence& s) { return engine.sample(s, sampler, mask); });
  }

  py::tuple log_probabilities(const py::object& token, const py::object& top) {
    const int32_t id = token_id(token);
    const auto n = static_cast<size_t>(integer(top, "top", 0, std::numeric_limits<int32_t>::max()));
    const LogProbabilities found =
        call([&](Engine& engine, Sequence& s) { return engine.log_probabilities(s, id, n); });
    py::list likeliest;
    for (const LogProbabilities::Of& each : found.top)
      likeliest.append(py::make_tuple(each.token, each.value));
    return py::make_tuple(found.value, likeliest);
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
    const py::gil_scoped_release release;
    engine.step(batch, report);
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
  void evaluate(const Prompt& prompt, const EmbeddingsList& embeddings, const PyProgress& progress,
                const Out& out) {
    const Progress report = make_progress(progress);
    const auto mine = turn();
    engine_->begin(sequence_, prompt, shared(embeddings));
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
  CallLock call_lock_;
};

}  // namespace

void register_sequence(py::module_& m) {
  py::class_<Prompt>(m, "Prompt", "Token ids with the images and videos that stand in them.")
      .def(py::init(&make_prompt), py::arg("model"), py::arg("token_ids"), py::arg("images") = py::tuple(),
           py::arg("n_ctx") = kMostCells)
      .def("__len__", &Prompt::size)
      .def_property_readonly("runs", &runs)
      .def_property_readonly("positions", &positions)
      .def("common_prefix", &Prompt::common_prefix, py::arg("other"));

  py::class_<Sampler>(m, "Sampler", "Draws tokens from logits.")
      .def(py::init(&make_sampler), py::arg("temperature") = 0.0f, py::arg("top_k") = 0,
           py::arg("top_p") = 1.0f, py::arg("min_p") = 0.0f, py::arg("repetition_penalty") = 1.0f,
           py::arg("presence_penalty") = 0.0f, py::arg("frequency_penalty") = 0.0f,
           py::arg("no_repeat_ngram_size") = 0, py::arg("logit_bias") = py::dict(), py::arg("seed") = 0);

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
      .def("look_up", &PySequence::look_up, py::arg("most"))
      .def("guess", &PySequence::guess, py::arg("tokens"))
      .def("accept", &PySequence::accept, py::arg("token"))
      .def_property_readonly("logits", &PySequence::logits)
      .def("sample", &PySequence::sample, py::arg("sampler"), py::arg("allowed") = py::none())
      .def("log_probabilities", &PySequence::log_probabilities, py::arg("token"), py::arg("top") = 0);
  m.def("step", &PySequence::step, py::arg("states"), py::arg("rows"), py::arg("progress") = py::none());
}

}  // namespace qwen2vl::bindings
