#pragma once

#include "cpu/kernels/neon/vectors.h"

namespace qwen2vl::cpu {
namespace {

/// smmla multiplies eight columns of two rows.
constexpr int kPanelRun = 8;

}  // namespace
}  // namespace qwen2vl::cpu
