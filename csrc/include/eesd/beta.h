// Beta(alpha, beta) samples as X / (X + Y) of two gamma deviates by Marsaglia and Tsang (2000).
//
// Draw `attempt` of element (seed, position, bucket) takes the four words of
//   philox(key = seed, counter = (bucket, position, 0, PHILOX_BETA + attempt * 256)):
// words 0 and 1 make two normals (Box-Muller), the cosine's for X and the sine's for Y, words 2 and
// 3 their acceptance uniforms. Each gamma takes its first accepted attempt. A shape a below 1 is
// drawn at a + 1 and multiplied by U^(1/a), U from word 0 (X) or 1 (Y) of PHILOX_BETA_BOOST,
// attempt 0; this and the ratio are done on logarithms, so that shapes of 0.05 and less stay exact.
//
// Samples are float32 in [FLT_MIN, 1 - 2^-24]: what rounds to 0 or 1 is clamped to these ends (half
// of Beta(0.05, 0.05) sits within 1e-6 of an end). Shapes are taken into [1e-30, 1e30].
// Host and device share this file bit for bit: see mathf.h for the flags it needs.
#pragma once

#include <cmath>
#include <cstdint>

#include "eesd/mathf.h"
#include "eesd/philox.h"
#include "eesd/status.h"

namespace eesd {

// Acceptance is above 0.95 at every shape; 64 misses have probability below 1e-83.
constexpr uint32_t kBetaMaxAttempts = 64;
constexpr float kBetaSmallest = 1.17549435e-38f;             // FLT_MIN
constexpr float kBetaLargest = 0.999999940395355224609375f;  // 1 - 2^-24

struct gamma_shape {
  float d, c, d3;  // a - 1/3, 1 / sqrt(9 d), 3 d
};

EESD_HD gamma_shape make_gamma_shape(float a) {
  const float d = (a + select(mask_of(a < 1.0f), 1.0f, 0.0f)) - 0.333333343f;
  return gamma_shape{d, 1.0f / sqrtf(9.0f * d), 3.0f * d};
}

struct gamma_draw {
  float value;
  uint32_t accepted;  // a mask, see mask_of
};

// Marsaglia-Tsang: v = (1 + t)^3, t = c z; accept iff log u <= z^2/2 + d (1 - v + log v). With
// z^2/2 = 4.5 d t^2 the right side is 3 d (log(1+t) - t + t^2/2 - t^3/3), exact at any d.
EESD_HD gamma_draw draw_gamma(const gamma_shape& shape, float z, uint32_t uniform_word) {
  // v must be positive. Stopping at t = -0.9999 instead of -1 keeps the logarithm's argument
  // normal and drops a mass below 1e-10.
  const float lowest = -0.9999f;
  const float t = maxf(shape.c * z, lowest);
  const float log_u = logf_exact(philox_uniform32(uniform_word));
  const uint32_t accepted = mask_of(t > lowest) & mask_of(log_u <= shape.d3 * log1p_minus_cubic(t));
  const float w = 1.0f + t;
  return gamma_draw{shape.d * (w * w * w), accepted};
}

struct gamma_pair {
  gamma_draw x, y;
};

EESD_HD gamma_pair draw_gamma_pair(const gamma_shape& sx, const gamma_shape& sy, uint32_t key_lo,
                                   uint32_t key_hi, uint32_t position, uint32_t bucket,
                                   uint32_t attempt) {
  const philox_words r = philox4x32_10(key_lo, key_hi, bucket, position, 0u,
                                       philox_purpose_word(PHILOX_BETA, attempt));
  const float radius = sqrtf(-2.0f * logf_exact(philox_uniform32(r.x)));
  const cos_sin angle = turn(r.y);
  return gamma_pair{draw_gamma(sx, radius * angle.c, r.z), draw_gamma(sy, radius * angle.s, r.w)};
}

// log U / a where a < 1, else 0.
EESD_HD float gamma_log_boost(float a, uint32_t word) {
  return select(mask_of(a < 1.0f), logf_exact(philox_uniform32(word)) / a, 0.0f);
}

// The smaller side is formed by division and the larger as its complement: near 1 the grid of
// floats is too coarse for x / (x + y).
EESD_HD float beta_finish(float small_side, bool first_is_small) {
  const float s = select(mask_of(first_is_small), small_side, 1.0f - small_side);
  return minf(maxf(s, kBetaSmallest), kBetaLargest);
}

EESD_HD float beta_from_gammas(float x, float y) {
  return beta_finish(minf(x, y) / (x + y), x <= y);
}

EESD_HD float beta_from_boosted(float x, float y, float boost_x, float boost_y) {
  const float log_odds = (logf_exact(x) - logf_exact(y)) + (boost_x - boost_y);
  const float s = expf_exact(maxf(-absf(log_odds), -87.5f));
  return beta_finish(s / (1.0f + s), log_odds <= 0.0f);
}

EESD_HD bool beta_shape_ok(float a) { return a > 0.0f && a <= 3.402823466e38f; }
EESD_HD float beta_shape_clamp(float a) { return minf(maxf(a, 1e-30f), 1e30f); }

// One sample with both shapes ok: what a CUDA thread does. The CPU does attempt 0 of many elements
// in vector lanes and calls finish_gamma for the one in twelve or so that missed.
EESD_HD void finish_gammas(const gamma_shape& sx, const gamma_shape& sy, uint32_t key_lo,
                           uint32_t key_hi, uint32_t position, uint32_t bucket, uint32_t attempt,
                           gamma_draw* x, gamma_draw* y) {
  for (; attempt < kBetaMaxAttempts && !(x->accepted & y->accepted); ++attempt) {
    const gamma_pair g = draw_gamma_pair(sx, sy, key_lo, key_hi, position, bucket, attempt);
    if (!x->accepted) *x = g.x;
    if (!y->accepted) *y = g.y;
  }
}

EESD_HD float sample_beta_one(float alpha, float beta, int64_t seed, uint32_t position,
                              uint32_t bucket) {
  const float a = beta_shape_clamp(alpha), b = beta_shape_clamp(beta);
  const gamma_shape sx = make_gamma_shape(a), sy = make_gamma_shape(b);
  const uint32_t lo = philox_key_lo(seed), hi = philox_key_hi(seed);
  gamma_draw x{sx.d, 0u}, y{sy.d, 0u};
  finish_gammas(sx, sy, lo, hi, position, bucket, 0, &x, &y);
  if (a >= 1.0f && b >= 1.0f) return beta_from_gammas(x.value, y.value);
  const philox_words r = philox4x32_10(lo, hi, bucket, position, 0u, PHILOX_BETA_BOOST);
  return beta_from_boosted(x.value, y.value, gamma_log_boost(a, r.x), gamma_log_boost(b, r.y));
}

}  // namespace eesd

extern "C" {

// Element i belongs to row i / buckets and uses bucket i % buckets as its counter index.
typedef struct eesd_sample_beta_params {
  const float* alpha;       // [n]
  const float* beta;        // [n]
  const int64_t* seed;      // [n / buckets]
  const int32_t* position;  // [n / buckets]
  int64_t n;
  int64_t buckets;  // at least 1; n is a multiple
  float* out;       // [n]
  int32_t* status;  // [n] or null: 0, or 1 where a shape is not positive and finite (out NaN)
} eesd_sample_beta_params;

eesd_status eesd_sample_beta_cpu(const eesd_sample_beta_params* params);

// Device pointers and a cudaStream_t of the current device; in the library where it was built with
// CUDA (EESD_WITH_CUDA).
eesd_status eesd_sample_beta_cuda(const eesd_sample_beta_params* params, void* stream);
}
