// Philox in bulk and the Beta sampler, written as plain loops that the compiler turns into vector
// code for the instruction set of the including file. Integer and IEEE arithmetic only: the bits
// do not depend on the instruction set.
#pragma once

#include <cstdint>

#include "eesd/beta.h"
#include "eesd/philox.h"

namespace {

void philox_fill(uint32_t key_lo, uint32_t key_hi, uint32_t first_index, uint32_t position,
                 uint32_t base, uint32_t purpose, int64_t n, uint32_t* out) {
  using namespace eesd;
  const int64_t quads = n / 4;
  // Blocks with a constant trip count through a transposing buffer: gcc vectorises neither an
  // int64 loop counter narrowed to the 32-bit counter word nor the interleaved store as well.
  constexpr int kBlock = 64;
  uint32_t words[4][kBlock];
  for (int64_t q = 0; q < quads; q += kBlock) {
    const uint32_t index = first_index + static_cast<uint32_t>(q);
    for (uint32_t j = 0; j < kBlock; ++j) {
      const philox_words w = philox4x32_10(key_lo, key_hi, index + j, position, base, purpose);
      words[0][j] = w.x;
      words[1][j] = w.y;
      words[2][j] = w.z;
      words[3][j] = w.w;
    }
    const int valid = static_cast<int>(quads - q < kBlock ? quads - q : kBlock);
    for (int j = 0; j < valid; ++j) {
      for (int k = 0; k < 4; ++k) out[4 * (q + j) + k] = words[k][j];
    }
  }
  if (n % 4) {
    const philox_words w = philox4x32_10(key_lo, key_hi, first_index + static_cast<uint32_t>(quads),
                                         position, base, purpose);
    const uint32_t last[4] = {w.x, w.y, w.z, w.w};
    for (int64_t i = 4 * quads; i < n; ++i) out[i] = last[i & 3];
  }
}

constexpr int kBetaBlock = 64;

struct beta_lanes {
  float a[kBetaBlock], b[kBetaBlock];  // clamped shapes
  uint32_t key_lo[kBetaBlock], key_hi[kBetaBlock], position[kBetaBlock], bucket[kBetaBlock];
  float x[kBetaBlock], y[kBetaBlock];
  uint32_t x_accepted[kBetaBlock], y_accepted[kBetaBlock];
  float sample[kBetaBlock];
};

// Attempt 0 in every lane, the misses one by one.
__attribute__((noinline)) void beta_gammas(beta_lanes& l) {
  using namespace eesd;
  for (int i = 0; i < kBetaBlock; ++i) {
    const gamma_pair g = draw_gamma_pair(make_gamma_shape(l.a[i]), make_gamma_shape(l.b[i]),
                                         l.key_lo[i], l.key_hi[i], l.position[i], l.bucket[i], 0);
    l.x[i] = g.x.value;
    l.y[i] = g.y.value;
    l.x_accepted[i] = g.x.accepted;
    l.y_accepted[i] = g.y.accepted;
  }
  for (int i = 0; i < kBetaBlock; ++i) {
    if (l.x_accepted[i] & l.y_accepted[i]) continue;
    gamma_draw x{l.x[i], l.x_accepted[i]}, y{l.y[i], l.y_accepted[i]};
    finish_gammas(make_gamma_shape(l.a[i]), make_gamma_shape(l.b[i]), l.key_lo[i], l.key_hi[i],
                  l.position[i], l.bucket[i], 1, &x, &y);
    l.x[i] = x.value;
    l.y[i] = y.value;
  }
}

__attribute__((noinline)) void beta_combine(beta_lanes& l, bool any_below_one) {
  using namespace eesd;
  for (int i = 0; i < kBetaBlock; ++i) l.sample[i] = beta_from_gammas(l.x[i], l.y[i]);
  if (!any_below_one) return;
  for (int i = 0; i < kBetaBlock; ++i) {
    const philox_words r =
        philox4x32_10(l.key_lo[i], l.key_hi[i], l.bucket[i], l.position[i], 0u, PHILOX_BETA_BOOST);
    const float boosted = beta_from_boosted(l.x[i], l.y[i], gamma_log_boost(l.a[i], r.x),
                                            gamma_log_boost(l.b[i], r.y));
    l.sample[i] = select(mask_of(l.a[i] < 1.0f) | mask_of(l.b[i] < 1.0f), boosted, l.sample[i]);
  }
}

void sample_beta(const eesd_sample_beta_params& p) {
  using namespace eesd;
  beta_lanes lanes;
  int64_t row = 0, bucket = 0;
  for (int64_t first = 0; first < p.n; first += kBetaBlock) {
    const int count = static_cast<int>(p.n - first < kBetaBlock ? p.n - first : kBetaBlock);
    bool any_below_one = false, any_bad = false;
    for (int i = 0; i < kBetaBlock; ++i) {
      const bool live = i < count;
      const float alpha = live ? p.alpha[first + i] : 1.0f;
      const float beta = live ? p.beta[first + i] : 1.0f;
      const bool ok = beta_shape_ok(alpha) & beta_shape_ok(beta);
      lanes.a[i] = ok ? beta_shape_clamp(alpha) : 1.0f;
      lanes.b[i] = ok ? beta_shape_clamp(beta) : 1.0f;
      any_bad |= !ok;
      any_below_one |= (lanes.a[i] < 1.0f) | (lanes.b[i] < 1.0f);
      const int64_t r = live ? row : 0;
      lanes.key_lo[i] = philox_key_lo(p.seed[r]);
      lanes.key_hi[i] = philox_key_hi(p.seed[r]);
      lanes.position[i] = static_cast<uint32_t>(p.position[r]);
      lanes.bucket[i] = static_cast<uint32_t>(bucket);
      if (++bucket == p.buckets) {
        bucket = 0;
        ++row;
      }
    }
    beta_gammas(lanes);
    beta_combine(lanes, any_below_one);
    for (int i = 0; i < count; ++i) {
      p.out[first + i] = lanes.sample[i];
      if (p.status) p.status[first + i] = 0;
    }
    if (!any_bad) continue;
    for (int i = 0; i < count; ++i) {
      if (beta_shape_ok(p.alpha[first + i]) && beta_shape_ok(p.beta[first + i])) continue;
      p.out[first + i] = bits_float(0x7FC00000u);
      if (p.status) p.status[first + i] = 1;
    }
  }
}

}  // namespace
