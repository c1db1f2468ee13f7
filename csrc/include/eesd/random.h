// Philox words of token noise, in bulk: the CPU's draft and target races and their tests.
#pragma once

#include <stdint.h>

#include "eesd/status.h"

#ifdef __cplusplus
extern "C" {
#endif

// out[r, i] = word (id mod 4) of philox(key = seed[r],
//     counter = (id div 4 + parent[r] * 2^26, position[r], base[r], purpose)),
// id = ids ? ids[r, i] : i. Divisions floor and integers enter the counter as their 32 bits, so a
// padding id of -1 gives a defined (and useless) word.
typedef struct eesd_philox_words_params {
  const int64_t* seed;      // [rows]
  const int32_t* position;  // [rows]
  const int32_t* base;      // [rows] round base
  const int32_t* ids;       // [rows, n], or null: 0..n-1 in every row
  const int32_t* parent;    // [rows] parent node of a tree draft, or null: 0
  uint32_t purpose;         // purpose + attempt * 256
  int64_t rows;
  int64_t n;
  uint32_t* out;  // [rows, n]
} eesd_philox_words_params;

eesd_status eesd_philox_words_cpu(const eesd_philox_words_params* params);

// Device pointers and a cudaStream_t of the current device; in the library where it was built with
// CUDA (EESD_WITH_CUDA).
eesd_status eesd_philox_words_cuda(const eesd_philox_words_params* params, void* stream);

#ifdef __cplusplus
}
#endif
