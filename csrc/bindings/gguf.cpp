#include <string>
#include <type_traits>
#include <vector>

#include "bindings/arguments.h"
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

py::str utf8(const gguf::File& file, std::string_view bytes, const std::string& where) {
  PyObject* decoded = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), nullptr);
  if (decoded == nullptr) {
    PyErr_Clear();
    throw FormatError(file.path() + ": " + where + ": expected UTF-8, found " + gguf::in_quotes(bytes));
  }
  return py::reinterpret_steal<py::str>(decoded);
}

/// A metadata value as int, float, bool, str or a list of these; nothing points into the file's own.
py::object to_python(const gguf::File& file, const gguf::Value& value, const std::string& where) {
  const auto scalar = [&](const auto& item) -> py::object {
    using T = std::decay_t<decltype(item)>;
    if constexpr (std::is_same_v<T, std::string_view>) {
      return utf8(file, item, where);
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
  for (const gguf::Key& key : file.keys()) {
    const std::string where = "key " + gguf::in_quotes(key.name);
    out[utf8(file, key.name, where)] = to_python(file, key.value, where);
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
    utf8(file, tensor.name, "tensor " + gguf::in_quotes(tensor.name));  // refuses what Python could not name
    out.push_back({std::string(tensor.name), std::string(gguf::find_storage_type(tensor.type)->name),
                   shape_of(tensor), tensor.offset, tensor.data_bytes});
  }
  return out;
}

const gguf::Tensor& tensor_named(const gguf::File& file, std::string_view name) {
  const gguf::Tensor* tensor = file.find_tensor(name);
  if (tensor == nullptr) throw py::key_error(file.path() + ": no tensor " + gguf::in_quotes(name));
  return *tensor;
}

py::array_t<float> read(const gguf::File& file, const py::str& name) {
  const gguf::Tensor& tensor = tensor_named(file, text(name));
  const DTypeTraits* traits = find_dtype(tensor.type);
  if (traits == nullptr) {
    throw UnsupportedError(file.path() + ": tensor " + gguf::in_quotes(tensor.name) + ": stored as " +
                           std::string(gguf::find_storage_type(tensor.type)->name) +
                           ", which is not computed; computed are " + dtype_names());
  }
  py::array_t<float> out(std::vector<py::ssize_t>(tensor.shape.begin(), tensor.shape.end()));
  float* to = out.mutable_data();
  const int64_t cols = tensor.shape.back();
  const int64_t rows = out.size() / cols;
  const int64_t bytes = row_bytes(traits->type, cols);
  const py::gil_scoped_release release;
  std::vector<uint8_t> stored(static_cast<size_t>(bytes));
  for (int64_t row = 0; row < rows; ++row) {
    tensor.input->read(tensor.offset + static_cast<uint64_t>(row * bytes), stored);
    dequantize_row(traits->type, stored.data(), cols, to + row * cols);
  }
  return out;
}

py::array_t<uint8_t> raw(const gguf::File& file, const py::str& name, const py::object& begin,
                         const py::object& n_bytes) {
  const gguf::Tensor& tensor = tensor_named(file, text(name));
  const auto size = static_cast<int64_t>(tensor.data_bytes);
  const int64_t from = integer(begin, "begin", 0, size);
  const int64_t count = n_bytes.is_none() ? size - from : integer(n_bytes, "n_bytes", 0, size - from);
  py::array_t<uint8_t> out(static_cast<py::ssize_t>(count));
  uint8_t* to = out.mutable_data();
  const py::gil_scoped_release release;
  tensor.input->read(tensor.offset + static_cast<uint64_t>(from), {to, static_cast<size_t>(count)});
  return out;
}

/// Each key's name and its entry as the file has it.
py::list entries(const gguf::File& file) {
  py::list out;
  std::string entry;
  for (const gguf::Key& key : file.keys()) {
    entry.resize(static_cast<size_t>(key.n_bytes));
    file.parts().front()->input.read(key.offset, {reinterpret_cast<uint8_t*>(entry.data()), entry.size()});
    out.append(py::make_tuple(utf8(file, key.name, "key " + gguf::in_quotes(key.name)), py::bytes(entry)));
  }
  return out;
}

}  // namespace

void register_gguf(py::module_& m) {
  py::class_<TensorInfo>(m, "TensorInfo")
      .def_readonly("name", &TensorInfo::name)
      .def_readonly("type", &TensorInfo::type)
      .def_readonly("shape", &TensorInfo::shape)
      .def_readonly("offset", &TensorInfo::offset)
      .def_readonly("n_bytes", &TensorInfo::n_bytes);

  py::class_<gguf::File>(m, "GgufFile", "A checked GGUF file.")
      .def(py::init([](const py::object& name) {
             const std::filesystem::path opened = path(name, "path");
             const py::gil_scoped_release release;
             return std::make_unique<gguf::File>(opened);
           }),
           py::arg("path"))
      .def_property_readonly("version", &gguf::File::version)
      .def_property_readonly("alignment", &gguf::File::alignment)
      .def_property_readonly("n_bytes", &gguf::File::n_bytes)
      .def_property_readonly("metadata", &metadata)
      .def_property_readonly("entries", &entries)
      .def_property_readonly("tensors", &tensors)
      .def("read", &read, py::arg("name"), "A tensor, dequantized to float32 in its shape.")
      .def("raw", &raw, py::arg("name"), py::arg("begin") = 0, py::arg("n_bytes") = py::none(),
           "A tensor's bytes as stored (a copy), or some of them.");
}

}  // namespace qwen2vl::bindings
