#pragma once

#include "model/backend_abi.h"

namespace qwen2vl::cuda {

/// What the device can do at most in a second; each figure takes `seconds` or a little more.
qwen2vl_limits measure_limits(int device, double seconds);

}  // namespace qwen2vl::cuda
