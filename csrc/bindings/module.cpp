#include "bindings/bindings.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "The native core of qwen2vl-q.";
  m.attr("__version__") = QWEN2VL_VERSION;
  qwen2vl::bindings::register_errors(m);
  qwen2vl::bindings::register_machine(m);
  qwen2vl::bindings::register_quantize(m);
  qwen2vl::bindings::register_gguf(m);
  qwen2vl::bindings::register_config(m);
  qwen2vl::bindings::register_model(m);
  qwen2vl::bindings::register_vision(m);
  qwen2vl::bindings::register_sequence(m);
}
