// What every launcher shares.
#pragma once

#include <cuda_runtime_api.h>

#include "eesd/status.h"

namespace eesd::cuda {

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// The launch's own error; without a device it is that one.
inline eesd_status launched() {
  return cudaGetLastError() == cudaSuccess ? EESD_OK : EESD_ERROR_CUDA;
}

constexpr int64_t kMaxBlocks = 2147483647;  // of a grid's x dimension

inline int64_t blocks_for(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

// 64-bit division costs a GPU some hundred instructions, 32-bit division twenty.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

}  // namespace eesd::cuda
