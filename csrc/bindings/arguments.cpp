#include "bindings/arguments.h"

#include <chrono>
#include <limits>
#include <stdexcept>
#include <string_view>

#include "base/printable.h"
#include "base/thread_pool.h"

namespace qwen2vl::bindings {
namespace {

py::object steal(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object as_int(const py::handle& value, const char* name) {
  if (!PyIndex_Check(value.ptr()))
    throw py::type_error(std::string(name) + ": expected an integer, found " + shown(value));
  return steal(PyNumber_Index(value.ptr()));
}

[[noreturn]] void out_of_range(const py::handle& value, const char* name, const std::string& low,
                               const std::string& high) {
  throw std::invalid_argument(std::string(name) + ": expected " + low + " to " + high + ", found " +
                              shown(value));
}

}  // namespace

std::string shown(const py::handle& value) {
  const auto repr = py::reinterpret_steal<py::object>(PyObject_Repr(value.ptr()));
  if (!repr) {  // an integer of thousands of digits
    PyErr_Clear();
    return std::string("<") + Py_TYPE(value.ptr())->tp_name + ">";
  }
  return printable(text(repr));
}

int64_t integer(const py::handle& value, const char* name, int64_t low, int64_t high) {
  const py::object exact = as_int(value, name);
  int overflow = 0;
  const long long found = PyLong_AsLongLongAndOverflow(exact.ptr(), &overflow);
  if (overflow != 0 || found < low || found > high)
    out_of_range(value, name, std::to_string(low), std::to_string(high));
  return found;
}

int thread_count(const py::handle& value) {
  return static_cast<int>(integer(value, "n_threads", 0, ThreadPool::kMaxThreads));
}

uint64_t unsigned_integer(const py::handle& value, const char* name) {
  const py::object exact = as_int(value, name);
  const unsigned long long found = PyLong_AsUnsignedLongLong(exact.ptr());
  if (PyErr_Occurred() == nullptr) return found;
  PyErr_Clear();
  out_of_range(value, name, "0", std::to_string(std::numeric_limits<uint64_t>::max()));
}

float number(const py::handle& value, const char* name) {
  const double found = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred() == nullptr) return static_cast<float>(found);
  const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError) != 0;
  PyErr_Clear();
  if (too_large) return std::numeric_limits<float>::infinity();
  throw py::type_error(std::string(name) + ": expected a number, found " + shown(value));
}

std::string text(const py::str& value) {
  return py::bytes(steal(PyUnicode_AsEncodedString(value.ptr(), "utf-8", "backslashreplace")));
}

std::filesystem::path path(const py::handle& value, const char* name) {
#ifdef _WIN32
  const auto system_path = steal(PyOS_FSPath(value.ptr()));
  PyObject* converted = nullptr;
  if (PyUnicode_FSDecoder(system_path.ptr(), &converted) == 0) {
#else
  PyObject* converted = nullptr;
  if (PyUnicode_FSConverter(value.ptr(), &converted) == 0) {
#endif
    if (PyErr_ExceptionMatches(PyExc_ValueError) == 0) throw py::error_already_set();
    PyErr_Clear();
    throw std::invalid_argument(std::string(name) + ": expected a path without NUL, found " + shown(value));
  }
  const auto owned = py::reinterpret_steal<py::object>(converted);
#ifdef _WIN32
  Py_ssize_t length = 0;
  wchar_t* wide = PyUnicode_AsWideCharString(owned.ptr(), &length);
  if (wide == nullptr) throw py::error_already_set();
  const std::wstring native(wide, static_cast<size_t>(length));
  PyMem_Free(wide);
  return native;
#else
  return std::string_view(py::reinterpret_borrow<py::bytes>(owned));
#endif
}

void require_shape(const FloatArray& array, int64_t rows, int64_t cols, const std::string& name) {
  if (array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == cols) return;
  std::string found = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) found += (i ? ", " : "") + std::to_string(array.shape(i));
  throw std::invalid_argument(name + ": expected shape (" + std::to_string(rows) + ", " +
                              std::to_string(cols) + "), found " + found + ")");
}

GridTHW to_grid(const GridTuple& grid) {
  const auto size = [](const py::object& value) { return integer(value, "grid_thw", 1, kMostPatches); };
  return {size(std::get<0>(grid)), size(std::get<1>(grid)), size(std::get<2>(grid))};
}

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

}  // namespace qwen2vl::bindings
