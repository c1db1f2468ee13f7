// Drafting on the CPU: the candidates of a row of exit logits, and draws from their sparse law.
#pragma once

#include <stdint.h>

#include "eesd/status.h"

#ifdef __cplusplus
extern "C" {
#endif

// How a row's draft tokens are chosen, and so which rule may verify them.
typedef enum eesd_law {
  EESD_LAW_SAMPLED = 0,
  EESD_LAW_DETERMINISTIC = 1,
  EESD_LAW_COUPLED = 2,
  EESD_LAW_BLOCK = 3
} eesd_law;

// The k largest logits of each row, descending, ties to the lower id, and the row's logsumexp.
// A row with NaN or +inf, or without a finite logit: ids -1, values and logsumexp NaN.
typedef struct eesd_topk_logsumexp_params {
  const float* logits;  // [rows, vocab]
  int64_t rows, vocab, k;
  float* values;     // [rows, k]
  int32_t* ids;      // [rows, k]
  float* logsumexp;  // [rows]
} eesd_topk_logsumexp_params;

// n children of each row, drawn from softmax(values / temperature) without replacement, in
// descending perturbed score; temperature 0 or the deterministic law: the n best.
typedef struct eesd_sample_draft_params {
  const float* values;       // [rows, k]
  const int32_t* ids;        // [rows, k], -1: no candidate
  const float* temperature;  // [rows]
  const int32_t* law;        // [rows], an eesd_law
  const int64_t* seed;       // [rows]
  const int32_t* position;   // [rows] place of the drawn token
  const int32_t* base;       // [rows] round base
  const int32_t* parent;     // [rows] tree node, or null: 0
  int64_t rows, k, n;
  int32_t* child_ids;  // [rows, n], -1 where no candidate is left
  float* probs;        // [rows, k] the law; one-hot at temperature 0
} eesd_sample_draft_params;

eesd_status eesd_topk_logsumexp_cpu(const eesd_topk_logsumexp_params* params);
eesd_status eesd_sample_draft_cpu(const eesd_sample_draft_params* params);

#ifdef __cplusplus
}
#endif
