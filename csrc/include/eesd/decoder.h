// The decoder's small ops on the CPU, float32: RMSNorm, SwiGLU, RoPE with the cache write, and
// attention of a block over the cache. Each row is reduced in one fixed order, whatever rows stand
// beside it and whatever the number of threads, so a token's bits are the same decoded alone, in a
// draft's verification or in a batch.
#pragma once

#include <stdint.h>

#include "eesd/linear.h"
#include "eesd/status.h"

#ifdef __cplusplus
extern "C" {
#endif

// out = x / sqrt(mean(x^2) + eps) * weight
typedef struct eesd_rms_norm_params {
  const float* x;      // [rows, size]
  const void* weight;  // [size] of weight_dtype
  eesd_dtype weight_dtype;
  float eps;
  int64_t rows, size;
  float* out;  // [rows, size]
} eesd_rms_norm_params;

// out = silu(gate) * up, gate and up the halves of a row
typedef struct eesd_swiglu_params {
  const float* gate_up;  // [rows, 2 size]
  int64_t rows, size;
  float* out;  // [rows, size]
} eesd_swiglu_params;

// Rotate q and k (half-split RoPE) for position lengths[b] + depth, write k and v to cache slot
// lengths[b] + i. Rows at or above num_rows[b] write nothing to the cache and zeros to q_out.
typedef struct eesd_rope_cache_write_params {
  const float* qkv;  // [batch, rows, heads + 2 kv_heads, head_size]
  const float* cos;  // [positions, head_size / 2]
  const float* sin;
  float* k_cache;  // [batch, slots, kv_heads, head_size], batch_stride apart
  float* v_cache;
  int64_t batch_stride;     // elements from one sequence's cache to the next
  const int32_t* lengths;   // [batch]
  const int32_t* num_rows;  // [batch]
  const int32_t* depth;     // [batch, rows] or null: a linear block
  int64_t batch, rows, heads, kv_heads, head_size, slots, positions;
  float* q_out;  // [batch, rows, heads, head_size]
} eesd_rope_cache_write_params;

// Row i of sequence b sees slots 0 .. lengths[b]-1 and, of the block, slots lengths[b] + j with
// j <= i, or with bit j of ancestry[b, i] set; with a window only the last `window` positions of
// these, its own among them. Rows at or above num_rows[b] give zeros.
typedef struct eesd_tree_attention_params {
  const float* q;        // [batch, rows, heads, head_size]
  const float* k_cache;  // [batch, slots, kv_heads, head_size], batch_stride apart
  const float* v_cache;
  int64_t batch_stride;
  const int32_t* lengths;   // [batch]
  const int32_t* num_rows;  // [batch]
  const int64_t* ancestry;  // [batch, rows] bit masks, rows <= 64, or null: a linear block
  int64_t window;           // positions, or 0: all
  float scale;
  int64_t batch, rows, heads, kv_heads, head_size, slots;
  float* out;  // [batch, rows, heads, head_size]
} eesd_tree_attention_params;

eesd_status eesd_rms_norm_cpu(const eesd_rms_norm_params* params);
eesd_status eesd_swiglu_cpu(const eesd_swiglu_params* params);
eesd_status eesd_rope_cache_write_cpu(const eesd_rope_cache_write_params* params);
eesd_status eesd_tree_attention_cpu(const eesd_tree_attention_params* params);

#ifdef __cplusplus
}
#endif
