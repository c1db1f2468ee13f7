// Philox4x32-10 (Salmon et al., SC 2011), the only source of randomness in EESD: a pure function
// of a key and a counter, so CPU, GPU, kernel and reference draw the same bits in any order.
//
//   key     = (low, high) 32 bits of the sequence's int64 seed
//   counter = (index, absolute position, round base, purpose + attempt * 256)
//
// Words and the uniforms below are bit-equal everywhere: integer arithmetic, exact conversions and
// products, and at most one rounding (which a fused multiply-add would do alike).
#pragma once

#include <cstdint>

// always_inline also keeps these out of the symbol table: the library compiles the same header
// for several instruction sets, and the linker must not merge an AVX-512 copy with a plain one.
#if defined(__CUDACC__)
#define EESD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define EESD_HD static inline __attribute__((always_inline))
#else
#define EESD_HD static inline
#endif

#if defined(__CUDACC__)
#define EESD_UNROLL_10 _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__clang__)
#define EESD_UNROLL_10 _Pragma("GCC unroll 10")  // before it vectorises loops around this one
#else
#define EESD_UNROLL_10
#endif

namespace eesd {

// Draft, target and accept noise never share a purpose (the coupled law apart).
enum philox_purpose : uint32_t {
  PHILOX_DRAFT = 1,
  PHILOX_TARGET = 2,  // residual and bonus tokens
  PHILOX_ACCEPT = 3,
  PHILOX_BETA = 4,        // normals and acceptance uniforms of the Beta sampler, attempts counted
  PHILOX_BETA_BOOST = 5,  // the second stream of the Beta sampler: U^(1/a) for a below 1
  PHILOX_PLAN = 6         // the coin of each step of the bernoulli rule
};

struct philox_words {
  uint32_t x, y, z, w;
};

EESD_HD uint32_t philox_purpose_word(uint32_t purpose, uint32_t attempt) {
  return purpose + attempt * 256u;
}

EESD_HD philox_words philox4x32_10(uint32_t key_lo, uint32_t key_hi, uint32_t c0, uint32_t c1,
                                   uint32_t c2, uint32_t c3) {
  EESD_UNROLL_10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key_lo;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key_hi;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  return philox_words{c0, c1, c2, c3};
}

EESD_HD uint32_t philox_key_lo(int64_t seed) {
  return static_cast<uint32_t>(static_cast<uint64_t>(seed));
}

EESD_HD uint32_t philox_key_hi(int64_t seed) {
  return static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
}

// Counter word 0 of token noise: one call serves the ids 4q..4q+3, and every parent node of a tree
// draft has 2^26 calls (2^28 ids) of its own. The noise of id is word id mod 4.
EESD_HD uint32_t philox_token_index(int32_t id, uint32_t parent) {
  return static_cast<uint32_t>(id >> 2) + (parent << 26);
}

// 24 bits in [0, 1): accept iff u * q < p.
EESD_HD float philox_uniform24(uint32_t word) {
  return static_cast<float>(word >> 8) * 5.9604644775390625e-8f;  // 2^-24
}

// (x + 0.5) / 2^32 rounded once to float32: in (0, 1], finer towards 0. Both halves are exact in
// float32, so the addition is the only rounding.
EESD_HD float philox_uniform32(uint32_t word) {
  const float high = static_cast<float>(static_cast<int32_t>(word >> 16)) * 65536.0f;
  const float low = static_cast<float>(static_cast<int32_t>(word & 0xFFFFu)) + 0.5f;
  return (high + low) * 2.3283064365386963e-10f;  // 2^-32
}

// The same, clamped below 1, for race noise E = -log1p(-u): a 24-bit grid would lose the small
// noise that lets the tail of a 128k vocabulary win.
EESD_HD float philox_race_uniform(uint32_t word) {
  const float u = philox_uniform32(word);
  return u < 0.999999940395355224609375f ? u : 0.999999940395355224609375f;  // 1 - 2^-24
}

}  // namespace eesd
