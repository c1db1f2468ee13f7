// The controller's kernels. A few numbers a sequence: what they cost is a launch and the latency of
// one Beta draw (about a microsecond), so a batch is planned in one launch and nothing is staged.
//
// `cost` and `calibrated` choose one L for the batch, hence one block. Its threads draw theta row
// by row; then the rows' expected tokens are summed length by length, in the lanes and the tree
// that csrc/cpu/thompson.cpp uses, so the float64 sums and with them the lengths are the CPU's.
#include <cstdint>

#include "checks.h"
#include "cuda/launch.h"
#include "eesd/thompson.h"

namespace eesd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ plan_posterior row_posterior(const eesd_thompson_draft_length_params& p,
                                                        int64_t b) {
  if (p.rule == EESD_RULE_CALIBRATED) {
    return pooled_posterior(p.alpha + b * p.buckets, p.beta + b * p.buckets, p.buckets);
  }
  return plan_posterior{p.alpha[b], p.beta[b], 0u};
}

constexpr int kRows = 256;      // at once; a batch of no more is drawn once
constexpr int kTries = 2;       // threads a row: attempts of a draw that are made at once
constexpr int kLengths = 16;    // at once
constexpr int kSumThreads = 8;  // a length: each has four lanes of the sum
constexpr int kLeastThreads = kLengths * kSumThreads;  // every length has its own
constexpr int kCreditThreads = 32;                     // a warp more, where there is credit to sum
constexpr int kMostThreads = kRows * kTries;
constexpr int kStride = kRows + kSumThreads;  // neighbouring lengths lie in other banks
static_assert(kPlanLanes == 32 && kPlanLanes == 4 * kSumThreads, "the sum below is written for it");
static_assert(kRows % kPlanLanes == 0, "a row's lane is the same in every chunk");
static_assert(kBetaMaxAttempts % kTries == 0 && kMostThreads <= 1024, "whole rounds, one block");

// draw_theta by the kTries threads of a row, all of which return it. An attempt is most of what a
// draw costs, and of a batch's rows some need a second nearly always: hence two at once. Called by
// whole warps; threads without a row, or with one not in the round, pass wanted = false.
__device__ __forceinline__ float draw_theta_together(const plan_posterior& post, int64_t seed,
                                                     int32_t position, bool wanted) {
  wanted = wanted && beta_shape_ok(post.alpha) && beta_shape_ok(post.beta);
  const int lane = static_cast<int>(threadIdx.x % 32), mine = lane % kTries;
  const float a = beta_shape_clamp(post.alpha), b = beta_shape_clamp(post.beta);
  const gamma_shape sx = make_gamma_shape(a), sy = make_gamma_shape(b);
  const uint32_t lo = philox_key_lo(seed), hi = philox_key_hi(seed);
  const uint32_t where = static_cast<uint32_t>(position);
  float x = sx.d, y = sy.d;
  bool more_x = wanted, more_y = wanted;
  // As finish_gammas: each gamma takes its first accepted attempt, or else the last one made.
  const auto take = [&](const gamma_draw& g, float* value, bool* more) {
    const unsigned all = __ballot_sync(~0u, g.accepted != 0u);
    const unsigned ours = (all >> (lane - mine)) & ((1u << kTries) - 1u);
    const int from = ours ? __ffs(static_cast<int>(ours)) - 1 : kTries - 1;
    const float drawn = __shfl_sync(~0u, g.value, from, kTries);
    if (*more) *value = drawn;
    *more = *more && !ours;
  };
#pragma unroll 1
  for (uint32_t attempt = 0; attempt < kBetaMaxAttempts; attempt += kTries) {
    const gamma_pair g =
        draw_gamma_pair(sx, sy, lo, hi, where, post.index, attempt + static_cast<uint32_t>(mine));
    take(g.x, &x, &more_x);
    take(g.y, &y, &more_y);
    if (!__any_sync(~0u, more_x || more_y)) break;
  }
  if (!wanted) return -1.0f;
  if (a >= 1.0f && b >= 1.0f) return beta_from_gammas(x, y);
  const philox_words r = philox4x32_10(lo, hi, post.index, where, 0u, PHILOX_BETA_BOOST);
  return beta_from_boosted(x, y, gamma_log_boost(a, r.x), gamma_log_boost(b, r.y));
}

// One block is all there is: said, or ptxas spills on sm_80 to make room for a second.
__global__ void __launch_bounds__(kMostThreads, 1)
    plan_by_cost_kernel(eesd_thompson_draft_length_params p) {
  __shared__ double tokens[kLengths + 1][kStride];  // E of each row at each length; its credit
  __shared__ double rates[kLengths + 1];            // the last: the sum of the credits
  __shared__ int warp_longest[32];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int row = thread / kTries;
  const bool guarded = p.credit != nullptr;
  const int own_slot = thread / kSumThreads, part = thread % kSumThreads;  // of a length's sum
  const int slot = own_slot < kLengths ? own_slot : kLengths;  // the last: the credits' sum
  const bool summing = thread < kLeastThreads + (guarded ? kCreditThreads : 0);
  const bool speaks = thread % kTries == 0;
  const bool one_chunk = p.batch <= kRows;  // the usual case: a row's state stays in registers
  double best = 0.0;
  int64_t best_length = 0, longest = 0;
  int cap = -1, own = 0, seen = 0;  // the row's cap and longest draft; the largest cap so far
  float theta = -1.0f, credit = 0.0f;
  bool member = false;  // of those that share their credit
  int members = 0;
  const float plain = p.costs[0];
  float best_cost = plain;
  double credits = 0.0;
  expected_tokens e{0.0, 0.0};
  for (int64_t tile = 0; tile <= longest; tile += kLengths) {
    const float cost = summing && tile + slot < p.num_costs ? p.costs[tile + slot] : 1.0f;
    const int64_t candidate = tile + lane % kLengths;  // that this thread tries the price of
    const float candidate_cost = guarded && candidate < p.num_costs ? p.costs[candidate] : plain;
    members = 0;
    double s[4] = {0.0, 0.0, 0.0, 0.0};  // lanes part, part + 8, + 16 and + 24 of the sum
    for (int64_t chunk = 0; chunk < p.batch; chunk += kRows) {
      const int64_t b = chunk + row;
      if (tile == 0 || !one_chunk) {
        // All loads before the first use: their latencies then overlap.
        int64_t seed = 0;
        int32_t position = 0;
        plan_posterior post{1.0f, 1.0f, 0u};
        cap = -1;
        if (b < p.batch) {
          seed = p.seed[b];
          position = p.position[b];
          cap = static_cast<int>(clamp_cap(p.cap[b], p.num_costs));
          post = row_posterior(p, b);
          if (guarded) credit = p.credit[b];
        }
        const bool in_round = cap >= 0 && credit_ok(credit);
        member = guarded && in_round;
        // A maximum a warp, not an atomic: nothing has to be zeroed, and waited for, before it.
        seen = __reduce_max_sync(~0u, cap > seen ? cap : seen);
        if (lane == 0) warp_longest[thread / 32] = seen;
        theta = draw_theta_together(post, seed, position, in_round);
        // Rows without a say add +0, which changes no sum's bits; so do those past the batch.
        own = theta < 0.0f ? 0 : cap;
        e.power = e.total = theta < 0.0f ? 0.0 : 1.0;
        e = tokens_advance(e, theta, own < tile ? own : tile - 1);
        if (!one_chunk && tile == 0 && speaks && b < p.batch) p.length[b] = own;
      }
      if (speaks) {
        const int64_t ahead = p.num_costs - tile;
        const int lengths = ahead < kLengths ? static_cast<int>(ahead) : kLengths;
        const int steps = own - static_cast<int>(tile);
#pragma unroll
        for (int l = 0; l < kLengths; ++l) {
          if (l == lengths) break;
          if (l <= steps && (l > 0 || tile > 0)) e = tokens_advance(e, theta, 1);
          tokens[l][row] = e.total;
        }
        if (guarded) tokens[kLengths][row] = member ? static_cast<double>(credit) : 0.0;
      }
      if (guarded) {
        members += __syncthreads_count(speaks && member);
      } else {
        __syncthreads();
      }
      if (summing) {
        const int64_t left = p.batch - chunk;
        const int rows = left < kRows ? static_cast<int>(left) : kRows;
#pragma unroll 2
        for (int r = part; r - part < rows; r += kPlanLanes) {
#pragma unroll
          for (int j = 0; j < 4; ++j) s[j] += tokens[slot][r + j * kSumThreads];
        }
      }
      if (!one_chunk) __syncthreads();  // `tokens` and `warp_longest` are written again
    }
    if (tile == 0) {
      const int most = lane * 32 < static_cast<int>(blockDim.x) ? warp_longest[lane] : 0;
      longest = __reduce_max_sync(~0u, most);
    }
    if (summing) {
      // The tree over the lanes: widths 16 and 8 here, 4 to 1 between threads.
      double sum = (s[0] + s[2]) + (s[1] + s[3]);
#pragma unroll
      for (int width = 4; width > 0; width /= 2) sum += __shfl_xor_sync(~0u, sum, width);
      if (part == 0 && own_slot < kLengths) {
        const double rate = tile + slot <= longest ? sum / static_cast<double>(cost) : 0.0;
        rates[slot] = rate > 0.0 ? rate : 0.0;  // what is not above 0, NaN too, never wins
      }
      if (part == 0 && own_slot == kLengths) rates[kLengths] = sum;
    }
    __syncthreads();
    // Every warp finds the largest, and of equal ones the first: doubles from +0 up are ordered as
    // their bits are. The next tile writes `rates` after a barrier that these reads are before.
    double rate = rates[lane % kLengths];
    if (guarded) {
      credits = rates[kLengths];
      const double more = static_cast<double>(candidate_cost) - static_cast<double>(plain);
      if (!affordable(more * members, credits, plain)) rate = 0.0;
    }
    const unsigned high = static_cast<unsigned>(__double2hiint(rate));
    const unsigned low = static_cast<unsigned>(__double2loint(rate));
    const unsigned top_high = __reduce_max_sync(~0u, high);
    const unsigned top_low = __reduce_max_sync(~0u, high == top_high ? low : 0u);
    const unsigned tops = __ballot_sync(~0u, high == top_high && low == top_low);
    const double top = __hiloint2double(static_cast<int>(top_high), static_cast<int>(top_low));
    if (top > best) {
      best = top;
      best_length = tile + __ffs(static_cast<int>(tops)) - 1;
      best_cost = __shfl_sync(~0u, candidate_cost, __ffs(static_cast<int>(tops)) - 1);
    }
  }
  const double price = static_cast<double>(best_cost) / static_cast<double>(plain);
  const float left = static_cast<float>(credits / static_cast<double>(members) - price);
  const int chosen = static_cast<int>(best_length);
  for (int64_t b = row; speaks && b < p.batch; b += kRows) {
    if (!one_chunk) {
      own = p.length[b];  // what this thread wrote
      member = guarded && p.cap[b] >= 0 && credit_ok(p.credit[b]);
    }
    p.length[b] = own < chosen ? own : chosen;
    if (member) p.credit[b] = left;
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
    // Threads for the rows up to the next multiple of 32, which the sum runs over.
    const int64_t rows = blocks_for(p.batch < kRows ? p.batch : kRows, 32) * 32;
    const int64_t least = kLeastThreads + (p.credit ? kCreditThreads : 0);
    const int64_t threads = rows * kTries < least ? least : rows * kTries;
    plan_by_cost_kernel<<<1, static_cast<unsigned>(threads), 0, stream_of(stream)>>>(p);
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
