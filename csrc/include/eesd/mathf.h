// float32 log, exp and sine/cosine built from IEEE + - * /, comparisons and bit moves alone, so
// that every host compiler, vector width and GPU returns the same bits (libm and CUDA differ in
// their last ones). Needs -ffp-contract=off, nvcc --fmad=false. Branch-free: loops over them
// vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "eesd/philox.h"

namespace eesd {

EESD_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
#endif
}

EESD_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
#endif
}

// All ones or all zeros. Selecting through a mask keeps gcc from turning a conditional into a
// branch and specialising what follows, after which it no longer vectorises the loop around.
EESD_HD uint32_t mask_of(bool condition) { return 0u - static_cast<uint32_t>(condition); }
EESD_HD float select(uint32_t mask, float a, float b) {
  return bits_float((float_bits(a) & mask) | (float_bits(b) & ~mask));
}

EESD_HD float minf(float a, float b) { return select(mask_of(a < b), a, b); }
EESD_HD float maxf(float a, float b) { return select(mask_of(a > b), a, b); }
EESD_HD float absf(float a) { return bits_float(float_bits(a) & 0x7FFFFFFFu); }

// Q of log(1 + f) = f - f^2/2 + f^3/3 + f^4 Q(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]; weighted
// minimax fit, worth 1.5e-9 of the logarithm and 2.7e-6 of Q.
EESD_HD float log1p_tail(float f) {
  float q = 0.0673346594f;
  q = q * f - 0.114853904f;
  q = q * f + 0.117854208f;
  q = q * f - 0.124329612f;
  q = q * f + 0.142390132f;
  q = q * f - 0.166669756f;
  q = q * f + 0.200009674f;
  return q * f - 0.250000149f;
}

struct log_parts {
  float exponent;  // x = 2^exponent * (1 + fraction)
  float fraction;
};

// x positive and normal.
EESD_HD log_parts split_log(float x) {
  const uint32_t bits = float_bits(x);
  // Arithmetic shift of the distance to sqrt(1/2): the exponent that leaves [sqrt(1/2), sqrt(2)).
  const int32_t e = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float m = bits_float(bits - (static_cast<uint32_t>(e) << 23));
  return log_parts{static_cast<float>(e), m - 1.0f};
}

EESD_HD float log_from_parts(float e, float f) {
  const float f2 = f * f;
  const float tail = f2 * f * (0.333333343f + f * log1p_tail(f));
  return ((tail + e * -2.12194440e-4f) - 0.5f * f2 + f) + e * 0.693359375f;
}

// log x for positive normal x.
EESD_HD float logf_exact(float x) {
  const log_parts p = split_log(x);
  return log_from_parts(p.exponent, p.fraction);
}

// log(1 + t) - t + t^2/2 - t^3/3 for 1 + t positive and normal, without cancellation near 0.
EESD_HD float log1p_minus_cubic(float t) {
  const log_parts p = split_log(1.0f + t);
  const float t2 = t * t;
  const float near_zero = t2 * t2 * log1p_tail(t);
  const float direct =
      log_from_parts(p.exponent, p.fraction) - t * (1.0f - t * (0.5f - t * 0.333333343f));
  return select(mask_of(p.exponent == 0.0f), near_zero, direct);
}

// exp x for x in [-87, 88]; the caller clamps. Cephes' expf.
EESD_HD float expf_exact(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float k = (x * 1.44269504f + shift) - shift;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * (r * r) + r) + 1.0f;
  return y * bits_float(static_cast<uint32_t>(static_cast<int32_t>(k) + 127) << 23);
}

struct cos_sin {
  float c, s;
};

// Cosine and sine of 2 pi word / 2^32. The quadrant is the word's top two bits, shifted by an
// eighth of a turn, so that the polynomials see [-pi/4, pi/4); a rotated angle is as uniform.
EESD_HD cos_sin turn(uint32_t word) {
  const float fraction =
      static_cast<float>(static_cast<int32_t>(word << 2)) * 2.3283064365386963e-10f;
  const float a = fraction * 1.57079637f;
  const float a2 = a * a;
  const float s =
      a + a * a2 * (-1.6666654611e-1f + a2 * (8.3321608736e-3f + a2 * -1.9515295891e-4f));
  const float c =
      (1.0f - 0.5f * a2) +
      a2 * a2 *
          (4.166664568298827e-2f + a2 * (-1.388731625493765e-3f + a2 * 2.443315711809948e-5f));
  const uint32_t quadrant = word >> 30;
  const uint32_t odd = 0u - (quadrant & 1u);
  const uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30;  // quadrants 1 and 2
  const uint32_t sin_sign = (quadrant & 2u) << 30;         // quadrants 2 and 3
  return cos_sin{bits_float(float_bits(select(odd, s, c)) ^ cos_sign),
                 bits_float(float_bits(select(odd, c, s)) ^ sin_sign)};
}

}  // namespace eesd
