#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <tuple>

#include "bindings/bindings.h"
#include "model/backend.h"

namespace qwen2vl::bindings {

// Arguments as Python gives them, so that what is out of range is told by name: pybind11's own conversions
// know no more than that nothing fits. `name` is the parameter's.

/// TypeError where `value` is no integer, ValueError where it is not in [low, high].
int64_t integer(const py::handle& value, const char* name, int64_t low, int64_t high);
uint64_t unsigned_integer(const py::handle& value, const char* name);
/// n_threads: 0 (automatic) to ThreadPool's most.
int thread_count(const py::handle& value);

/// TypeError where `value` is no number; infinity for one that no float holds.
float number(const py::handle& value, const char* name);

/// A str as UTF-8; halves of surrogate pairs become text that nothing is called.
std::string text(const py::str& value);

/// A str, bytes or os.PathLike as the system takes it: bytes that are not UTF-8 come back as they were.
/// ValueError where it holds a NUL, which would end it.
std::filesystem::path path(const py::handle& value, const char* name);

using FloatArray = py::array_t<float, py::array::c_style>;
void require_shape(const FloatArray& array, int64_t rows, int64_t cols, const std::string& name);

using GridTuple = std::tuple<py::object, py::object, py::object>;
GridTHW to_grid(const GridTuple& grid);

/// Wraps a Python callback for a call that runs without the GIL: at most every 50 ms, and at the end, it
/// takes the GIL, lets pending signals raise (Ctrl-C) and reports. Any exception cancels the call.
using PyProgress = std::optional<py::function>;
Progress make_progress(const PyProgress& callback);

/// What a caller gave, for a message.
std::string shown(const py::handle& value);

}  // namespace qwen2vl::bindings
