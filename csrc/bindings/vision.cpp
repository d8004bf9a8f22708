#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "engine/engine.h"

namespace qwen2vl::bindings {
namespace {

using PixelArray = py::array_t<uint8_t, py::array::c_style>;

const VisionConfig& tower_of(const Engine& engine) {
  if (!engine.config().vision) throw std::invalid_argument("this model has no vision tower");
  return *engine.config().vision;
}

/// A VisionPass with all that it points at.
class PyVisionPass {
 public:
  PyVisionPass(std::shared_ptr<Engine> engine, const VisionInput& input, py::tuple arrays)
      : engine_(std::move(engine)),
        input_(input),
        arrays_(std::move(arrays)),
        rows_(std::make_shared<Embeddings>(vision_cells(input.grid, tower_of(*engine_)),
                                           tower_of(*engine_).hidden_size)) {}

  static std::unique_ptr<PyVisionPass> of_patches(std::shared_ptr<Engine> engine,
                                                  const FloatArray& pixel_values, const GridTuple& grid_thw) {
    const VisionConfig& vision = tower_of(*engine);
    const GridTHW grid = to_grid(grid_thw);
    require_shape(pixel_values, vision_cells(grid, vision) * vision.merge_unit(), vision.patch_dim(),
                  "pixel_values");
    return std::make_unique<PyVisionPass>(std::move(engine), VisionInput{grid, pixel_values.data()},
                                          py::make_tuple(pixel_values));
  }

  static std::unique_ptr<PyVisionPass> of_pixels(std::shared_ptr<Engine> engine, const PixelArray& pixels,
                                                 const FloatArray& levels, const GridTuple& grid_thw) {
    const VisionConfig& vision = tower_of(*engine);
    const GridTHW grid = to_grid(grid_thw);
    vision_cells(grid, vision);
    const int64_t side = vision.patch_size;
    if (grid.t != 1)
      throw std::invalid_argument("grid_thw: expected one temporal step, found " + std::to_string(grid.t));
    require_shape(levels, vision.in_channels, 256, "levels");
    if (pixels.ndim() != 3 || pixels.shape(0) != grid.h * side || pixels.shape(1) != grid.w * side ||
        pixels.shape(2) != vision.in_channels)
      throw std::invalid_argument("pixels: expected shape (" + std::to_string(grid.h * side) + ", " +
                                  std::to_string(grid.w * side) + ", " + std::to_string(vision.in_channels) +
                                  ")");
    return std::make_unique<PyVisionPass>(std::move(engine),
                                          VisionInput{grid, nullptr, pixels.data(), levels.data()},
                                          py::make_tuple(pixels, levels));
  }

  std::shared_ptr<Embeddings> advance(double seconds, const PyProgress& progress) {
    const Progress report = make_progress(progress);
    const py::gil_scoped_release release;
    const Engine::Turn turn(*engine_);
    if (!pass_) pass_ = turn.backend.begin_vision(input_, rows_->data());
    return pass_->advance(seconds, report) ? rows_ : nullptr;
  }

 private:
  std::shared_ptr<Engine> engine_;
  VisionInput input_;
  py::tuple arrays_;
  std::shared_ptr<Embeddings> rows_;
  std::unique_ptr<VisionPass> pass_;
};

std::shared_ptr<Embeddings> copy_of(const FloatArray& rows) {
  if (rows.ndim() != 2) throw std::invalid_argument("rows: expected [n, hidden_size]");
  auto made = std::make_shared<Embeddings>(rows.shape(0), rows.shape(1));
  std::copy_n(rows.data(), rows.size(), made->data());
  return made;
}

/// A view that nobody writes to.
py::array as_array(const py::object& self) {
  const auto& rows = self.cast<const Embeddings&>();
  FloatArray view({rows.rows(), rows.hidden_size()}, rows.row(0), self);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

}  // namespace

void register_vision(py::module_& m) {
  py::class_<Embeddings, std::shared_ptr<Embeddings>>(m, "Embeddings", "An image's or video's rows.")
      .def(py::init(&copy_of), py::arg("rows"))
      .def_property_readonly("shape",
                             [](const Embeddings& e) { return py::make_tuple(e.rows(), e.hidden_size()); })
      .def_property_readonly("nbytes", &Embeddings::bytes)
      .def("numpy", &as_array);

  py::class_<PyVisionPass>(m, "VisionPass", "An image or video on its way through the tower.")
      .def(py::init(&PyVisionPass::of_patches), py::arg("model"), py::arg("pixel_values"),
           py::arg("grid_thw"))
      .def_static("of_pixels", &PyVisionPass::of_pixels, py::arg("model"), py::arg("pixels"),
                  py::arg("levels"), py::arg("grid_thw"))
      .def("advance", &PyVisionPass::advance, py::arg("seconds") = std::numeric_limits<double>::infinity(),
           py::arg("progress") = py::none());
}

}  // namespace qwen2vl::bindings
