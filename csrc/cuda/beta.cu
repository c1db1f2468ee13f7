// Beta samples, the twin of csrc/cpu/simd/random_kernel.h: both run eesd/beta.h.
//
// Bound by arithmetic: an attempt is one Philox call, four logarithms, two square roots and a sine
// and cosine, some 400 instructions against 24 bytes. What would waste it is the rejection loop: a
// warp of 32 would run until its last thread accepts, twice as many attempts as needed at shape 1.
// So every thread makes attempt 0 of its elements without a branch, and the few that missed (1 in
// 12 at shape 1, 1 in 500 at (50, 30)) go to a list in shared memory that the block's first warps
// finish, densely packed. Which of them takes an element changes nothing but the time.
#include <cstdint>

#include "checks.h"
#include "cuda/launch.h"
#include "eesd/beta.h"

namespace eesd::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPerThread = 4;
constexpr int kPerBlock = kThreads * kPerThread;

struct beta_element {
  float a, b;  // clamped
  uint32_t key_lo, key_hi, position, bucket;
  bool ok;
};

__device__ __forceinline__ beta_element load_element(const eesd_sample_beta_params& p, int64_t i) {
  const int64_t row = p.buckets == 1 ? i : divide(i, p.buckets);
  const float alpha = p.alpha[i], beta = p.beta[i];
  const int64_t seed = p.seed[row];
  return beta_element{beta_shape_clamp(alpha),
                      beta_shape_clamp(beta),
                      philox_key_lo(seed),
                      philox_key_hi(seed),
                      static_cast<uint32_t>(p.position[row]),
                      static_cast<uint32_t>(i - row * p.buckets),
                      beta_shape_ok(alpha) && beta_shape_ok(beta)};
}

__device__ __forceinline__ float combine(const beta_element& e, float x, float y) {
  if (e.a >= 1.0f && e.b >= 1.0f) return beta_from_gammas(x, y);
  const philox_words r =
      philox4x32_10(e.key_lo, e.key_hi, e.bucket, e.position, 0u, PHILOX_BETA_BOOST);
  return beta_from_boosted(x, y, gamma_log_boost(e.a, r.x), gamma_log_boost(e.b, r.y));
}

__global__ void __launch_bounds__(kThreads) sample_beta_kernel(eesd_sample_beta_params p) {
  __shared__ int missed;
  __shared__ int missed_at[kPerBlock];
  __shared__ gamma_pair missed_pair[kPerBlock];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPerBlock;
  if (threadIdx.x == 0) missed = 0;
  __syncthreads();

#pragma unroll 1
  for (int k = 0; k < kPerThread; ++k) {
    const int at = k * kThreads + static_cast<int>(threadIdx.x);
    const int64_t i = first + at;
    if (i >= p.n) break;
    const beta_element e = load_element(p, i);
    if (p.status) p.status[i] = e.ok ? 0 : 1;
    if (!e.ok) {
      p.out[i] = bits_float(0x7FC00000u);
      continue;
    }
    const gamma_pair g = draw_gamma_pair(make_gamma_shape(e.a), make_gamma_shape(e.b), e.key_lo,
                                         e.key_hi, e.position, e.bucket, 0);
    if (g.x.accepted & g.y.accepted) {
      p.out[i] = combine(e, g.x.value, g.y.value);
    } else {
      const int slot = atomicAdd(&missed, 1);
      missed_at[slot] = at;
      missed_pair[slot] = g;
    }
  }
  __syncthreads();

  for (int slot = static_cast<int>(threadIdx.x); slot < missed; slot += kThreads) {
    const int64_t i = first + missed_at[slot];
    const beta_element e = load_element(p, i);
    gamma_pair g = missed_pair[slot];
    finish_gammas(make_gamma_shape(e.a), make_gamma_shape(e.b), e.key_lo, e.key_hi, e.position,
                  e.bucket, 1, &g.x, &g.y);
    p.out[i] = combine(e, g.x.value, g.y.value);
  }
}

}  // namespace
}  // namespace eesd::cuda

eesd_status eesd_sample_beta_cuda(const eesd_sample_beta_params* params, void* stream) {
  using namespace eesd::cuda;
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_status status = eesd::check_params(*params);
  if (status != EESD_OK || params->n == 0) return status;
  const int64_t blocks = blocks_for(params->n, kPerBlock);
  if (blocks > kMaxBlocks) return EESD_ERROR_SIZE;
  sample_beta_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_of(stream)>>>(*params);
  return launched();
}
