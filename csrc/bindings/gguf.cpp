#include <string>
#include <type_traits>
#include <vector>

#include "bindings/bindings.h"
#include "gguf/cursor.h"
#include "gguf/reader.h"
#include "gguf/types.h"
#include "quant/quantize.h"

namespace qwen2vl::bindings {
namespace {

struct TensorInfo {
  std::string name;
  std::string type;
  py::tuple shape;
  uint64_t offset;
  uint64_t n_bytes;
};

py::str text(const gguf::File& file, std::string_view bytes, const std::string& where) {
  PyObject* decoded = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), nullptr);
  if (decoded == nullptr) {
    PyErr_Clear();
    throw FormatError(file.path() + ": " + where + ": expected UTF-8, found " + gguf::quoted(bytes));
  }
  return py::reinterpret_steal<py::str>(decoded);
}

/// A metadata value as int, float, bool, str or a list of these; nothing points into the mapped file.
py::object to_python(const gguf::File& file, const gguf::Value& value, const std::string& where) {
  const auto scalar = [&](const auto& item) -> py::object {
    using T = std::decay_t<decltype(item)>;
    if constexpr (std::is_same_v<T, std::string_view>) {
      return text(file, item, where);
    } else {
      return py::cast(item);
    }
  };
  return std::visit(
      [&](const auto& item) -> py::object {
        if constexpr (std::is_same_v<std::decay_t<decltype(item)>, gguf::Array>) {
          return std::visit(
              [&](const auto& items) -> py::object {
                py::list list(items.size());
                for (size_t i = 0; i < items.size(); ++i) {
                  list[i] = scalar(static_cast<typename std::decay_t<decltype(items)>::value_type>(items[i]));
                }
                return list;
              },
              item);
        } else {
          return scalar(item);
        }
      },
      value);
}

py::dict metadata(const gguf::File& file) {
  py::dict out;
  for (const auto& [key, value] : file.metadata()) {
    const std::string where = "key " + gguf::quoted(key);
    out[text(file, key, where)] = to_python(file, value, where);
  }
  return out;
}

py::tuple shape_of(const gguf::Tensor& tensor) {
  py::tuple shape(tensor.shape.size());
  for (size_t i = 0; i < tensor.shape.size(); ++i) shape[i] = tensor.shape[i];
  return shape;
}

std::vector<TensorInfo> tensors(const gguf::File& file) {
  std::vector<TensorInfo> out;
  out.reserve(file.tensors().size());
  for (const gguf::Tensor& tensor : file.tensors()) {
    text(file, tensor.name, "tensor " + gguf::quoted(tensor.name));  // refuses what Python could not name
    out.push_back({std::string(tensor.name), std::string(gguf::find_storage_type(tensor.type)->name),
                   shape_of(tensor), tensor.offset, tensor.data_bytes});
  }
  return out;
}

const gguf::Tensor& tensor_named(const gguf::File& file, const std::string& name) {
  const gguf::Tensor* tensor = file.find_tensor(name);
  if (tensor == nullptr) throw py::key_error(file.path() + ": no tensor " + gguf::quoted(name));
  return *tensor;
}

py::array_t<float> read(const gguf::File& file, const std::string& name) {
  const gguf::Tensor& tensor = tensor_named(file, name);
  const DTypeTraits* traits = find_dtype(tensor.type);
  if (traits == nullptr) {
    throw UnsupportedError(file.path() + ": tensor " + gguf::quoted(name) + ": type " +
                           std::string(gguf::find_storage_type(tensor.type)->name) +
                           " is not supported; expected F32, F16, BF16, Q8_0, Q4_0 or Q6_K");
  }
  py::array_t<float> out(std::vector<py::ssize_t>(tensor.shape.begin(), tensor.shape.end()));
  float* to = out.mutable_data();
  const int64_t cols = tensor.shape.back();
  const int64_t rows = out.size() / cols;
  const int64_t bytes = row_bytes(traits->type, cols);
  const py::gil_scoped_release release;
  for (int64_t row = 0; row < rows; ++row) {
    dequantize_row(traits->type, tensor.data + row * bytes, cols, to + row * cols);
  }
  return out;
}

py::array_t<uint8_t> raw(const gguf::File& file, const std::string& name) {
  const gguf::Tensor& tensor = tensor_named(file, name);
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(tensor.data_bytes), tensor.data);
}

}  // namespace

void register_gguf(py::module_& m) {
  py::class_<TensorInfo>(m, "TensorInfo")
      .def_readonly("name", &TensorInfo::name)
      .def_readonly("type", &TensorInfo::type)
      .def_readonly("shape", &TensorInfo::shape)
      .def_readonly("offset", &TensorInfo::offset)
      .def_readonly("n_bytes", &TensorInfo::n_bytes);

  py::class_<gguf::File>(m, "GgufFile", "A checked, memory-mapped GGUF file.")
      .def(py::init<const std::string&>(), py::arg("path"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("version", &gguf::File::version)
      .def_property_readonly("alignment", &gguf::File::alignment)
      .def_property_readonly("metadata", &metadata)
      .def_property_readonly("tensors", &tensors)
      .def("read", &read, py::arg("name"), "A tensor, dequantized to float32 in its shape.")
      .def("raw", &raw, py::arg("name"), "A tensor's bytes as stored (a copy).");
}

}  // namespace qwen2vl::bindings
