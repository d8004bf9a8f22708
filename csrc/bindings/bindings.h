#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace qwen2vl {
struct ModelConfig;
}

namespace qwen2vl::bindings {

namespace py = pybind11;

/// As `Model.config` gives it; see qwen2vl_q.engine.config.Qwen2VLConfig for the keys.
py::dict config_dict(const ModelConfig& config);

void register_errors(py::module_& m);    // errors.cpp
void register_machine(py::module_& m);   // machine.cpp: instruction sets, threads
void register_quantize(py::module_& m);  // quantize.cpp
void register_gguf(py::module_& m);      // gguf.cpp
void register_config(py::module_& m);    // config.cpp: what a file is
void register_model(py::module_& m);     // model.cpp
void register_vision(py::module_& m);    // vision.cpp
void register_sequence(py::module_& m);  // sequence.cpp: prompts, samplers, steps

}  // namespace qwen2vl::bindings
