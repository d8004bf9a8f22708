#include "base/error.h"
#include "bindings/bindings.h"

namespace qwen2vl::bindings {

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
}

}  // namespace qwen2vl::bindings
