// A vector of float32 lanes for the product kernel: AVX-512, AVX2 + FMA, or four plain lanes that
// any compiler maps to what the machine has (SSE2, NEON). The file that includes this is compiled
// once per instruction set; everything here has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using vec = __m512;

inline vec vzero() { return _mm512_setzero_ps(); }
inline vec vload(const float* p) { return _mm512_loadu_ps(p); }
inline vec vfma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }

// 2 * kLanes weights at p, of which the first `valid` exist (the rest read as 0 and are not
// touched). float32: lanes in order. bfloat16: even elements, then odd ones, since widening a pair
// in place is one shift and one mask; pack_x orders x the same way.
inline void vload2(const float* p, vec& first, vec& second) {
  first = _mm512_loadu_ps(p);
  second = _mm512_loadu_ps(p + 16);
}
inline void vload2(const float* p, int valid, vec& first, vec& second) {
  const uint32_t mask = (uint32_t{1} << valid) - 1;
  first = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  second = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16);
}
inline void widen(__m512i pairs, vec& even, vec& odd) {
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
}
inline void vload2(const uint16_t* p, vec& even, vec& odd) {
  widen(_mm512_loadu_si512(p), even, odd);
}
inline void vload2(const uint16_t* p, int valid, vec& even, vec& odd) {
  widen(_mm512_maskz_loadu_epi16((uint32_t{1} << valid) - 1, p), even, odd);
}

// The four lane sums, each by the same tree.
inline void vsum4(vec a, vec b, vec c, vec d, float* sums) {
  const vec ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const vec cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  vec s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4E));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xB1));
  const __m512i heads = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
  _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_permutexvar_ps(heads, s)));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using vec = __m256;

inline vec vzero() { return _mm256_setzero_ps(); }
inline vec vload(const float* p) { return _mm256_loadu_ps(p); }
inline vec vfma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline void vload2(const float* p, vec& first, vec& second) {
  first = _mm256_loadu_ps(p);
  second = _mm256_loadu_ps(p + 8);
}
inline void vload2(const uint16_t* p, vec& even, vec& odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
}
inline void vsum4(vec a, vec b, vec c, vec d, float* sums) {
  const vec ab = _mm256_hadd_ps(a, b), cd = _mm256_hadd_ps(c, d);
  const vec s = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

#else

constexpr int kLanes = 4;
struct vec {
  float lane[4];
};

inline vec vzero() { return vec{{0.0f, 0.0f, 0.0f, 0.0f}}; }
inline vec vload(const float* p) {
  vec v;
  std::memcpy(v.lane, p, sizeof v.lane);
  return v;
}
inline vec vfma(vec a, vec b, vec c) {
  vec v;
  for (int i = 0; i < 4; ++i) v.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
  return v;
}
inline void vload2(const float* p, vec& first, vec& second) {
  first = vload(p);
  second = vload(p + 4);
}
inline void vload2(const uint16_t* p, vec& even, vec& odd) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t lo = static_cast<uint32_t>(p[2 * i]) << 16;
    const uint32_t hi = static_cast<uint32_t>(p[2 * i + 1]) << 16;
    std::memcpy(&even.lane[i], &lo, 4);
    std::memcpy(&odd.lane[i], &hi, 4);
  }
}
inline void vsum4(vec a, vec b, vec c, vec d, float* sums) {
  const vec* v[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) {
    sums[i] = (v[i]->lane[0] + v[i]->lane[1]) + (v[i]->lane[2] + v[i]->lane[3]);
  }
}

#endif

#if !defined(__AVX512F__)
template <class W>
inline void vload2(const W* p, int valid, vec& first, vec& second) {
  W padded[2 * kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(valid) * sizeof(W));
  vload2(padded, first, second);
}
#endif

}  // namespace
