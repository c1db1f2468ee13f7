// One row of RMSNorm, SwiGLU and attention. Sums run over sixteen lanes whatever the vector width,
// so the bits do not depend on the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "eesd/mathf.h"

namespace {

constexpr int kSumLanes = 16;

inline float sum_lanes(const float* lane) {
  float s[kSumLanes];
  for (int i = 0; i < kSumLanes; ++i) s[i] = lane[i];
  for (int width = kSumLanes / 2; width; width /= 2) {
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  }
  return s[0];
}

inline float dot(const float* a, const float* b, int64_t n) {
  float lane[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; ++j) lane[j] += a[i + j] * b[i + j];
  }
  for (int j = 0; i + j < n; ++j) lane[j] += a[i + j] * b[i + j];
  return sum_lanes(lane);
}

inline float widen_one(uint16_t bits) {
  return eesd::bits_float(static_cast<uint32_t>(bits) << 16);
}
inline float widen_one(float value) { return value; }

template <class W>
void rms_norm_row(const float* x, const W* weight, float eps, int64_t n, float* out) {
  const float scale = 1.0f / sqrtf(dot(x, x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * widen_one(weight[i]);
}

void rms_norm_f32(const float* x, const void* weight, float eps, int64_t n, float* out) {
  rms_norm_row(x, static_cast<const float*>(weight), eps, n, out);
}

void rms_norm_bf16(const float* x, const void* weight, float eps, int64_t n, float* out) {
  rms_norm_row(x, static_cast<const uint16_t*>(weight), eps, n, out);
}

void swiglu_row(const float* gate, const float* up, int64_t n, float* out) {
  using namespace eesd;
  for (int64_t i = 0; i < n; ++i) {
    const float e = expf_exact(minf(maxf(-gate[i], -87.0f), 87.0f));
    out[i] = gate[i] / (1.0f + e) * up[i];
  }
}

// Softmax-weighted sum of the values of `count` slots, in their order. slot: null for 0..count-1.
// scores has room for count floats. NaN anywhere among the scores makes the row NaN.
void attend_row(const float* q, const float* k, const float* v, int64_t slot_stride,
                const int32_t* slot, int64_t count, int64_t head_size, float scale, float* scores,
                float* out) {
  using namespace eesd;
  float top = -INFINITY, poison = 0.0f;
  for (int64_t s = 0; s < count; ++s) {
    const float score = scale * dot(q, k + (slot ? slot[s] : s) * slot_stride, head_size);
    scores[s] = score;
    top = maxf(top, score);
    poison += score * 0.0f;
  }
  for (int64_t s = 0; s < count; ++s) scores[s] = expf_exact(maxf(scores[s] - top, -87.0f));
  float lane[kSumLanes] = {};
  for (int64_t s = 0; s < count; ++s) lane[s % kSumLanes] += scores[s];
  const float inverse = 1.0f / sum_lanes(lane) + poison;
  for (int64_t d = 0; d < head_size; ++d) out[d] = 0.0f;
  for (int64_t s = 0; s < count; ++s) {
    const float p = scores[s];
    const float* value = v + (slot ? slot[s] : s) * slot_stride;
    for (int64_t d = 0; d < head_size; ++d) out[d] += p * value[d];
  }
  for (int64_t d = 0; d < head_size; ++d) out[d] *= inverse;
}

// log sum exp; NaN or +inf among the logits, or none finite, give a result that is not finite.
float logsumexp_row(const float* x, int64_t n) {
  using namespace eesd;
  float lane[kSumLanes];
  for (int j = 0; j < kSumLanes; ++j) lane[j] = -INFINITY;
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; ++j) lane[j] = maxf(x[i + j], lane[j]);
  }
  for (int j = 0; i + j < n; ++j) lane[j] = maxf(x[i + j], lane[j]);
  float top = lane[0];
  for (int j = 1; j < kSumLanes; ++j) top = maxf(top, lane[j]);
  if (!(absf(top) < INFINITY)) return top - top;  // NaN for either infinity
  for (int j = 0; j < kSumLanes; ++j) lane[j] = 0.0f;
  for (i = 0; i + kSumLanes <= n; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; ++j) {
      const float d = x[i + j] - top;
      const float e = expf_exact(maxf(d, -87.0f));
      lane[j] += d >= -87.0f ? e : d != d ? d : 0.0f;
    }
  }
  for (int j = 0; i + j < n; ++j) {
    const float d = x[i + j] - top;
    const float e = expf_exact(maxf(d, -87.0f));
    lane[j] += d >= -87.0f ? e : d != d ? d : 0.0f;
  }
  return top + logf_exact(sum_lanes(lane));
}

}  // namespace
