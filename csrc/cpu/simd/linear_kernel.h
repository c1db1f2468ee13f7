// The product of a block of weight rows with every x row.
//
// A tile is kWeights weight rows by up to four x rows, one accumulator vector per (x row, weight
// row) pair. A pair's sum runs over the features in ascending order whatever tile it is in, which
// is the whole of row invariance. Weight rows come from memory once and from L1 for x rows beyond
// the first tile.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/vec.h"

namespace {

using eesd::cpu::linear_block;

// The four rows of a tile are four short streams, which hardware prefetchers follow badly (1.6 ms
// for 23 MB that a plain read takes in 0.7); asking for the lines ahead in address order brings it
// to 0.9. Weight rows are contiguous, so the tiles ahead are simply the next bytes; the last
// requests reach past the end, where a prefetch does nothing. On one thread 3 to 24 KB measured
// alike; the shorter, the less of each chunk starts cold.
constexpr int kPrefetchBytes = 4 << 10;

template <class W, int kWeights, int kRows>
__attribute__((always_inline)) inline void tile(const linear_block& b, const W* const* weight,
                                                int64_t row, int64_t column, int live) {
  vec acc[kRows][kWeights];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWeights; ++w) acc[r][w] = vzero();
  }
  const float* x = b.packed_x + row * b.packed_stride;
  const int64_t n = b.in_features;
  int64_t k = 0;
  const char* ahead = reinterpret_cast<const char*>(weight[0]) + kPrefetchBytes;
  const auto step = [&](auto&& load) __attribute__((always_inline)) {
    vec w0[kWeights], w1[kWeights];
    constexpr int kStepBytes = kWeights * 2 * kLanes * static_cast<int>(sizeof(W));
#pragma GCC unroll 8
    for (int byte = 0; byte < kStepBytes; byte += 64) __builtin_prefetch(ahead + byte);
    ahead += kStepBytes;
#pragma GCC unroll 8
    for (int w = 0; w < kWeights; ++w) load(weight[w] + k, w0[w], w1[w]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vec x0 = vload(x + r * b.packed_stride + k);
      const vec x1 = vload(x + r * b.packed_stride + k + kLanes);
#pragma GCC unroll 8
      for (int w = 0; w < kWeights; ++w) {
        acc[r][w] = vfma(w1[w], x1, vfma(w0[w], x0, acc[r][w]));
      }
    }
  };
  for (; k + 2 * kLanes <= n; k += 2 * kLanes) {
    step([](const W* p, vec& a, vec& c) __attribute__((always_inline)) { vload2(p, a, c); });
  }
  if (k < n) {
    const int valid = static_cast<int>(n - k);
    step([valid](const W* p, vec& a, vec& c)
             __attribute__((always_inline)) { vload2(p, valid, a, c); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float sums[kWeights];
#pragma GCC unroll 2
    for (int w = 0; w < kWeights; w += 4) {
      vsum4(acc[r][w], acc[r][w + 1], acc[r][w + 2], acc[r][w + 3], sums + w);
    }
    float* out = b.out + (row + r) * b.out_stride + column;
    if (b.residual) {
      const float* residual = b.residual + (row + r) * b.residual_stride + column;
      for (int w = 0; w < live; ++w) out[w] = residual[w] + sums[w];
    } else {
      for (int w = 0; w < live; ++w) out[w] = sums[w];
    }
  }
}

template <class W>
void linear_rows(const linear_block& b, int64_t first, int64_t last) {
  constexpr int kWeights = 4;
  const W* weight = static_cast<const W*>(b.weight);
  for (int64_t o = first; o < last; o += kWeights) {
    const int live = static_cast<int>(last - o < kWeights ? last - o : kWeights);
    const W* rows[kWeights];
    for (int w = 0; w < kWeights; ++w) {
      rows[w] = weight + (o + (w < live ? w : live - 1)) * b.in_features;
    }
    int64_t r = 0;
    for (; r + 4 <= b.rows; r += 4) tile<W, kWeights, 4>(b, rows, r, o, live);
    switch (b.rows - r) {
      case 3:
        tile<W, kWeights, 3>(b, rows, r, o, live);
        break;
      case 2:
        tile<W, kWeights, 2>(b, rows, r, o, live);
        break;
      case 1:
        tile<W, kWeights, 1>(b, rows, r, o, live);
        break;
      default:
        break;
    }
  }
}

void linear_f32(const linear_block& b, int64_t first, int64_t last) {
  linear_rows<float>(b, first, last);
}

void linear_bf16(const linear_block& b, int64_t first, int64_t last) {
  linear_rows<uint16_t>(b, first, last);
}

void pack_x_f32(const float* x, int64_t n, float* packed) {
  if (n > 0) std::memcpy(packed, x, static_cast<size_t>(n) * sizeof(float));  // else x may be null
  for (int64_t i = n; i % (2 * kLanes); ++i) packed[i] = 0.0f;
}

// Blocks of 2 * kLanes features: the even ones, then the odd ones (see vload2).
void pack_x_bf16(const float* x, int64_t n, float* packed) {
  int64_t k = 0;
  for (; k + 2 * kLanes <= n; k += 2 * kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      packed[k + i] = x[k + 2 * i];
      packed[k + kLanes + i] = x[k + 2 * i + 1];
    }
  }
  if (k == n) return;
  for (int i = 0; i < kLanes; ++i) {
    packed[k + i] = k + 2 * i < n ? x[k + 2 * i] : 0.0f;
    packed[k + kLanes + i] = k + 2 * i + 1 < n ? x[k + 2 * i + 1] : 0.0f;
  }
}

}  // namespace
