#include "quant/quantize.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/thread_pool.h"
#include "bindings/arguments.h"
#include "bindings/bindings.h"

namespace qwen2vl::bindings {
namespace {

// Rows are handed to threads in pieces of about this many values: milliseconds of work, so that neither the
// hand-out nor the last piece counts.
constexpr int64_t kValuesPerPiece = 1 << 18;

const DTypeTraits& type_named(const py::str& name) {
  const DTypeTraits* traits = find_dtype(text(name));
  if (traits == nullptr) {
    throw std::invalid_argument("unknown type " + shown(name) + "; expected " + dtype_names());
  }
  return *traits;
}

/// The data of `array`, which must be a C-contiguous, aligned, two-dimensional array of T. Nothing is
/// converted: a silent copy would double the memory of a large tensor.
template <typename T>
const T* matrix(const py::array& array, const char* name) {
  const auto expected = py::dtype::of<T>();
  const bool contiguous = (array.flags() & py::array::c_style) != 0 &&
                          reinterpret_cast<uintptr_t>(array.data()) % alignof(T) == 0;
  if (!py::isinstance<py::array_t<T>>(array) || array.ndim() != 2 || !contiguous) {
    throw std::invalid_argument(std::string(name) + ": expected a C-contiguous, aligned, two-dimensional " +
                                py::str(expected).cast<std::string>() + " array, found " +
                                std::to_string(array.ndim()) + " dimensions of " +
                                py::str(array.dtype()).cast<std::string>() +
                                (contiguous ? "" : ", not contiguous"));
  }
  return static_cast<const T*>(array.data());
}

/// fn(row_begin, row_end) over all rows, on `n_threads` threads (0: default), without the GIL.
template <typename Fn>
void for_row_ranges(int64_t rows, int64_t cols, int n_threads, const Fn& fn) {
  const py::gil_scoped_release release;
  const int64_t grain = std::max<int64_t>(1, kValuesPerPiece / std::max<int64_t>(cols, 1));
  const int64_t pieces = (rows + grain - 1) / grain;
  const int wanted = n_threads == 0 ? default_thread_count() : n_threads;
  ThreadPool pool(static_cast<int>(std::clamp<int64_t>(pieces, 1, wanted)));
  pool.parallel_for(rows, grain, [&](int64_t begin, int64_t end, int) { fn(begin, end); });
}

/// Each column's weight in the search, or none. One value per column, 0 or more.
std::vector<float> column_weights(const py::object& weights, int64_t cols) {
  if (weights.is_none()) return {};
  const auto array = weights.cast<py::array>();
  if (!py::isinstance<py::array_t<float>>(array) || array.ndim() != 1 || array.shape(0) != cols) {
    throw std::invalid_argument("weights: expected a float32 array of " + std::to_string(cols) + ", found " +
                                std::to_string(array.size()) + " of " +
                                py::str(array.dtype()).cast<std::string>());
  }
  const auto found = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(array);
  return search_weights(found.data(), cols);
}

py::array_t<uint8_t> quantize(const py::array& values, const py::str& type, const py::object& n_threads,
                              const py::object& weights) {
  const int threads = thread_count(n_threads);
  const DTypeTraits& traits = type_named(type);
  const float* from = matrix<float>(values, "values");
  const int64_t rows = values.shape(0), cols = values.shape(1);
  const int64_t bytes = row_bytes(traits.type, cols);
  const std::vector<float> columns = column_weights(weights, cols);
  py::array_t<uint8_t> out({rows, bytes});
  uint8_t* to = out.mutable_data();
  for_row_ranges(rows, cols, threads, [&](int64_t begin, int64_t end) {
    quantize_rows(traits.type, from + begin * cols, end - begin, cols, to + begin * bytes,
                  columns.empty() ? nullptr : columns.data());
  });
  return out;
}

py::array_t<float> dequantize(const py::array& data, const py::str& type) {
  const DTypeTraits& traits = type_named(type);
  const uint8_t* from = matrix<uint8_t>(data, "data");
  const int64_t rows = data.shape(0), bytes = data.shape(1);
  if (bytes % traits.block_bytes != 0) {
    throw std::invalid_argument("data: expected rows of a multiple of " + std::to_string(traits.block_bytes) +
                                " bytes (" + std::string(traits.name) + "), found " + std::to_string(bytes));
  }
  const int64_t cols = bytes / traits.block_bytes * traits.block_elements;
  py::array_t<float> out({rows, cols});
  float* to = out.mutable_data();
  for_row_ranges(rows, cols, 0, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      dequantize_row(traits.type, from + row * bytes, cols, to + row * cols);
  });
  return out;
}

}  // namespace

void register_quantize(py::module_& m) {
  m.def("quantize", &quantize, py::arg("values"), py::arg("type"), py::arg("n_threads") = 0,
        py::arg("weights") = py::none(),
        "float32 [rows, cols] -> uint8 [rows, row_bytes] in GGUF blocks.\n\n"
        "F16, BF16 and Q8_0 equal gguf.quants bit for bit, Q4_0 without weights too; other blocks have the "
        "least\n"
        "square error found, each column's times its weight (float32 [cols]). ValueError: another dtype or "
        "shape,\n"
        "a row that the blocks do not divide, NaN or infinity for a block type or among weights.");
  m.def("written_types", &written_dtype_names,
        "The types that `quantize` has, in a list: \"F32, F16, ...\".");
  m.def("computed_types", &dtype_names, "The types that `dequantize` and the engine have, likewise.");
  m.def("dequantize", &dequantize, py::arg("data"), py::arg("type"),
        "uint8 [rows, row_bytes] -> float32 [rows, cols].");
  m.def(
      "block_layout",
      [](const py::str& type) {
        const DTypeTraits& traits = type_named(type);
        return std::pair(traits.block_elements, traits.block_bytes);
      },
      py::arg("type"), "(values per block, bytes per block) of a type.");
}

}  // namespace qwen2vl::bindings
