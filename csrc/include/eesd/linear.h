// out = x W^T (+ residual) for the few rows of a decoding or verification step.
//
// Bound by reading W once. A row's result is the same bits whatever `rows`, the other rows and the
// thread count are: every dot product runs over fixed lanes in ascending order and ends in one
// fixed tree. (Different instruction sets have different lanes, hence different last bits.)
#pragma once

#include <stdint.h>

#include "eesd/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct eesd_linear_params {
  const float* x;           // [rows, in_features]
  const void* weight;       // [out_features, in_features], contiguous
  eesd_dtype weight_dtype;  // float32, or bfloat16 (widened exactly; sums are float32)
  const float* residual;    // [rows, out_features] added last, or null; may be `out` itself
  float* out;               // [rows, out_features]; overlaps neither x nor weight
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  int64_t x_stride;         // elements from row to row; 0: in_features
  int64_t residual_stride;  // 0: out_features
  int64_t out_stride;       // 0: out_features
} eesd_linear_params;

eesd_status eesd_linear_cpu(const eesd_linear_params* params);

#ifdef __cplusplus
}
#endif
