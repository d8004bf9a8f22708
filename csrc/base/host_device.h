#pragma once

/// Of functions that a device's kernels call as well as the host.
#ifdef __CUDACC__
#define QWEN2VL_HOST_DEVICE __host__ __device__
#else
#define QWEN2VL_HOST_DEVICE
#endif
