// The controller's kernels. A few numbers a sequence: what they cost is a launch and the latency of
// one Beta draw (about a microsecond), so a batch is planned in one launch and nothing is staged.
//
// `cost` and `calibrated` choose one L for the batch, hence one block. Its threads draw theta row
// by row; then a warp a length sums the rows' expected tokens, in the lanes and the tree that
// csrc/cpu/thompson.cpp uses, so the float64 sums and with them the lengths are the CPU's.
#include <cstdint>

#include "checks.h"
#include "cuda/launch.h"
#include "eesd/thompson.h"

namespace eesd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 64;  // lengths whose sums are kept at once: 16 KiB
static_assert(kPlanLanes == 32, "a lane of the sum is a lane of a warp");

__device__ __forceinline__ plan_posterior row_posterior(const eesd_thompson_draft_length_params& p,
                                                        int64_t b) {
  if (p.rule == EESD_RULE_CALIBRATED) {
    return pooled_posterior(p.alpha + b * p.buckets, p.beta + b * p.buckets, p.buckets);
  }
  return plan_posterior{p.alpha[b], p.beta[b], 0u};
}

__global__ void __launch_bounds__(kThreads)
    plan_by_cost_kernel(eesd_thompson_draft_length_params p) {
  __shared__ double sums[kTile][kPlanLanes];
  __shared__ double rate[kTile];
  __shared__ float costs[kTile];
  __shared__ float row_theta[kThreads];
  __shared__ int row_cap[kThreads];
  __shared__ int longest, best_length;
  __shared__ double best;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if (thread == 0) {
    longest = best_length = 0;
    best = 0.0;
  }
  __syncthreads();

  for (int64_t tile = 0; tile == 0 || tile <= longest; tile += kTile) {
    const int lengths = static_cast<int>(p.num_costs - tile < kTile ? p.num_costs - tile : kTile);
    if (thread < lengths) costs[thread] = p.costs[tile + thread];
    for (int64_t chunk = 0; chunk < p.batch; chunk += kThreads) {
      const int64_t b = chunk + thread;
      if (b < p.batch) {
        // All loads before the first use: their latencies then overlap.
        const int64_t seed = p.seed[b];
        const int32_t position = p.position[b];
        const plan_posterior post = row_posterior(p, b);
        const int cap = static_cast<int>(clamp_cap(p.cap[b], p.num_costs));
        const float theta = cap < 0 ? -1.0f : draw_theta(post, seed, position);
        row_theta[thread] = theta;
        row_cap[thread] = cap;
        p.length[b] = theta < 0.0f ? 0 : cap;
        if (tile == 0 && cap > 0) atomicMax(&longest, cap);
      }
      __syncthreads();
      const int rows = static_cast<int>(p.batch - chunk < kThreads ? p.batch - chunk : kThreads);
      for (int l = warp; l < lengths; l += kWarps) {
        double sum = chunk == 0 ? 0.0 : sums[l][lane];
        for (int r = lane; r < rows; r += 32) {
          const int64_t cap = row_cap[r], length = tile + l < cap ? tile + l : cap;
          const float theta = row_theta[r];
          if (theta >= 0.0f) sum += tokens_advance(tokens_start(), theta, length).total;
        }
        sums[l][lane] = sum;
      }
      __syncthreads();
    }
    for (int l = warp; l < lengths; l += kWarps) {
      double sum = sums[l][lane];
      for (int width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(~0u, sum, width);
      if (lane == 0) rate[l] = sum / static_cast<double>(costs[l]);
    }
    __syncthreads();
    if (thread == 0) {
      for (int l = 0; l < lengths && tile + l <= longest; ++l) {
        if (rate[l] > best) {
          best = rate[l];
          best_length = static_cast<int>(tile + l);
        }
      }
    }
    __syncthreads();
  }
  // Each thread reads back what it wrote.
  for (int64_t b = thread; b < p.batch; b += kThreads) {
    if (p.length[b] > best_length) p.length[b] = best_length;
  }
}

// A warp a row: its lanes flip the coins of 32 steps at a time.
__global__ void __launch_bounds__(kThreads)
    plan_by_coins_kernel(eesd_thompson_draft_length_params p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (b >= p.batch) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t cap = clamp_cap(p.cap[b], p.num_costs);
  int64_t length = cap > 0 ? cap : 0;
  if (p.rule == EESD_RULE_BERNOULLI) {
    for (int64_t first = 0; first < cap; first += 32) {
      const int64_t step = first + lane;
      const bool stops =
          step < cap && !bernoulli_goes_on(p.alpha[b], p.beta[b], p.seed[b], p.position[b],
                                           static_cast<uint32_t>(step));
      const unsigned stopped = __ballot_sync(~0u, stops);
      if (stopped) {
        length = first + __ffs(static_cast<int>(stopped)) - 1;
        break;
      }
    }
  }
  if (lane == 0) p.length[b] = static_cast<int32_t>(length);
}

constexpr int kRowThreads = 64;

__global__ void __launch_bounds__(kRowThreads) look_kernel(eesd_thompson_look_params p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (b < p.batch) look_row(p, b);
}

__global__ void __launch_bounds__(kRowThreads) update_kernel(eesd_thompson_update_params p) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (e >= p.batch * p.buckets) return;
  const int64_t b = divide(e, p.buckets);
  update_element(p, b, e - b * p.buckets);
}

}  // namespace
}  // namespace eesd::cuda

eesd_status eesd_thompson_draft_length_cuda(const eesd_thompson_draft_length_params* params,
                                            void* stream) {
  using namespace eesd::cuda;
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_thompson_draft_length_params& p = *params;
  const eesd_status status = eesd::check_params(p);
  if (status != EESD_OK || p.batch == 0) return status;
  if (p.rule == EESD_RULE_COST || p.rule == EESD_RULE_CALIBRATED) {
    plan_by_cost_kernel<<<1, kThreads, 0, stream_of(stream)>>>(p);
    return launched();
  }
  const int64_t blocks = blocks_for(p.batch, kWarps);
  if (blocks > kMaxBlocks) return EESD_ERROR_SIZE;
  plan_by_coins_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_of(stream)>>>(p);
  return launched();
}

eesd_status eesd_thompson_look_cuda(const eesd_thompson_look_params* params, void* stream) {
  using namespace eesd::cuda;
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_status status = eesd::check_params(*params);
  if (status != EESD_OK || params->batch == 0) return status;
  const int64_t blocks = blocks_for(params->batch, kRowThreads);
  if (blocks > kMaxBlocks) return EESD_ERROR_SIZE;
  look_kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, stream_of(stream)>>>(*params);
  return launched();
}

eesd_status eesd_thompson_update_cuda(const eesd_thompson_update_params* params, void* stream) {
  using namespace eesd::cuda;
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_thompson_update_params& p = *params;
  const eesd_status status = eesd::check_params(p);
  if (status != EESD_OK || p.batch == 0) return status;
  if (p.batch > kMaxBlocks * kRowThreads / p.buckets) return EESD_ERROR_SIZE;
  const int64_t blocks = blocks_for(p.batch * p.buckets, kRowThreads);
  update_kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, stream_of(stream)>>>(p);
  return launched();
}
