// The inner loops that are compiled once per instruction set, and the choice between them.
#pragma once

#include <cstdint>

#include "eesd/beta.h"
#include "eesd/status.h"

namespace eesd::cpu {

// One block of a product: weight rows [first, last) for every x row. x is packed (see pack_x).
struct linear_block {
  const float* packed_x;  // [rows, packed_stride]
  int64_t packed_stride;
  const void* weight;
  const float* residual;
  float* out;
  int64_t rows, in_features, residual_stride, out_stride;
};

struct kernel_table {
  const char* isa;
  // Features a packed row is padded to a multiple of.
  int64_t pack_multiple;
  void (*pack_x_f32)(const float* x, int64_t n, float* packed);
  void (*pack_x_bf16)(const float* x, int64_t n, float* packed);
  void (*linear_f32)(const linear_block& block, int64_t first, int64_t last);
  void (*linear_bf16)(const linear_block& block, int64_t first, int64_t last);
  // n consecutive ids from 0: out[i] = word i mod 4 of counter word 0 = first_index + i div 4.
  void (*philox_fill)(uint32_t key_lo, uint32_t key_hi, uint32_t first_index, uint32_t position,
                      uint32_t base, uint32_t purpose, int64_t n, uint32_t* out);
  void (*sample_beta)(const eesd_sample_beta_params& params);
  // One row each; see csrc/cpu/simd/decoder_kernel.h.
  void (*rms_norm_f32)(const float* x, const void* weight, float eps, int64_t n, float* out);
  void (*rms_norm_bf16)(const float* x, const void* weight, float eps, int64_t n, float* out);
  void (*swiglu_row)(const float* gate, const float* up, int64_t n, float* out);
  float (*logsumexp_row)(const float* x, int64_t n);
  void (*attend_row)(const float* q, const float* k, const float* v, int64_t slot_stride,
                     const int32_t* slot, int64_t count, int64_t head_size, float scale,
                     float* scores, float* out);
};

extern const kernel_table kernels_generic;
#if defined(EESD_X86_SIMD)
extern const kernel_table kernels_avx2;
extern const kernel_table kernels_avx512;
#endif

// The best table for this machine; chosen once.
const kernel_table& kernels();

}  // namespace eesd::cpu
