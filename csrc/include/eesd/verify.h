// Linear draft verification on the CPU, float64 inside. The rule stands in
// eesd_kernels/reference/verify_linear.py and acceptance.py; this is the same walk, faster.
#pragma once

#include <stdint.h>

#include "eesd/draft.h"
#include "eesd/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct eesd_verify_linear_params {
  const float* target_logits;   // [batch, drafts + 1, vocab]
  const int32_t* draft_ids;     // [batch, drafts]
  const int32_t* draft_length;  // [batch], 0 to drafts
  const int32_t* q_ids;         // [batch, drafts, k], -1: padding
  const float* q_probs;         // [batch, drafts, k]
  const int32_t* law;           // [batch], an eesd_law; block is not taken
  const float* temperature;     // [batch], 0: greedy
  const int32_t* top_k;         // [batch], 0: off
  const float* top_p;           // [batch], 1: off
  const float* min_p;           // [batch], 0: off
  const int64_t* seed;          // [batch]
  const int32_t* position;      // [batch] place of the pending token
  const int32_t* base;          // [batch] round base
  int64_t batch, drafts, vocab, k;
  int32_t* num_accepted;  // [batch]
  int32_t* token_ids;     // [batch, drafts + 1]: accepted, then one more, then -1
  int32_t* status;        // [batch]: 1 where the walk met NaN, +inf or no finite logit
} eesd_verify_linear_params;

eesd_status eesd_verify_linear_cpu(const eesd_verify_linear_params* params);

#ifdef __cplusplus
}
#endif
