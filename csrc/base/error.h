#pragma once

#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>

#include "base/printable.h"

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

/// The system does not open or read a file.
class IoError : public Error {
 public:
  /// `code` as the system gives it: errno, on Windows GetLastError().
  IoError(const std::filesystem::path& path, const std::string& action, int code)
      : Error(printable_path(path) + ": cannot " + action + ": " +
              printable(std::system_category().message(code))),
        path_(path),
        code_(code) {}

  const std::filesystem::path& path() const { return path_; }
  int code() const { return code_; }

 private:
  std::filesystem::path path_;
  int code_;
};

/// A device that was asked for is not there, lacks memory, or failed.
class DeviceError : public Error {
 public:
  using Error::Error;
};

}  // namespace qwen2vl
