#pragma once

#include <stdexcept>
#include <string>

namespace qwen2vl {

/// Base of every error that the library raises on purpose. Wrong arguments raise std::invalid_argument.
/// A message says what was expected, what was found, and where (file, key or tensor, offset).
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file's content is not what its format says.
class FormatError : public Error {
 public:
  using Error::Error;
};

/// A well-formed input that this build or this machine cannot run.
class UnsupportedError : public Error {
 public:
  using Error::Error;
};

/// A device that was asked for is not there, lacks memory, or failed.
class DeviceError : public Error {
 public:
  using Error::Error;
};

}  // namespace qwen2vl
