#pragma once

#include "cpu/kernels/neon/vectors.h"

namespace qwen2vl::cpu {
namespace {

constexpr int kPanelRun = 4;

}  // namespace
}  // namespace qwen2vl::cpu
