#include <cerrno>
#include <exception>

#include "base/error.h"
#include "bindings/bindings.h"
#include "engine/page_pool.h"

namespace qwen2vl::bindings {
namespace {

/// FileNotFoundError, PermissionError and so on, as Python's own open() raises them.
void set_os_error(const IoError& error) {
#ifdef _WIN32
  const auto path = py::reinterpret_steal<py::object>(PyUnicode_FromWideChar(error.path().c_str(), -1));
  PyErr_SetExcFromWindowsErrWithFilenameObject(PyExc_OSError, error.code(), path.ptr());
#else
  const auto path = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.path().c_str()));
  errno = error.code();
  PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path.ptr());
#endif
}

}  // namespace

void register_errors(py::module_& m) {
  // Translators are tried from the last registered to the first, so the base class comes first.
  const auto base = py::register_exception<Error>(m, "Error");
  base.attr("__doc__") = "Base of the errors raised by the library.";
  py::register_exception<FormatError>(m, "FormatError", base).attr("__doc__") =
      "A file's content is not what its format says.";
  py::register_exception<UnsupportedError>(m, "UnsupportedError", base).attr("__doc__") =
      "A well-formed input that this build or machine cannot run.";
  py::register_exception<DeviceError>(m, "DeviceError", base).attr("__doc__") =
      "A device that was asked for is not there, lacks memory, or failed.";
  py::register_exception<OutOfPages>(m, "CacheFullError", base).attr("__doc__") =
      "The KV cache has no room for more cells.";
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      std::rethrow_exception(raised);
    } catch (const IoError& error) {
      set_os_error(error);
    }
  });
}

}  // namespace qwen2vl::bindings
