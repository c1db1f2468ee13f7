// What the CPU and CUDA forms of an op refuse alike.
#pragma once

#include "eesd/beta.h"
#include "eesd/random.h"
#include "eesd/thompson.h"

namespace eesd {

inline eesd_status check_params(const eesd_philox_words_params& p) {
  if (p.rows < 0 || p.n < 0) return EESD_ERROR_SIZE;
  if (p.rows == 0 || p.n == 0) return EESD_OK;
  return p.seed && p.position && p.base && p.out ? EESD_OK : EESD_ERROR_NULL_POINTER;
}

inline eesd_status check_params(const eesd_sample_beta_params& p) {
  if (p.n < 0 || p.buckets < 1 || p.n % p.buckets != 0) return EESD_ERROR_SIZE;
  if (p.n == 0) return EESD_OK;
  const bool given = p.alpha && p.beta && p.seed && p.position && p.out;
  return given ? EESD_OK : EESD_ERROR_NULL_POINTER;
}

inline eesd_status check_params(const eesd_thompson_draft_length_params& p) {
  const bool rule = p.rule >= EESD_RULE_BERNOULLI && p.rule <= EESD_RULE_CALIBRATED;
  const bool buckets = p.buckets >= 1 && (p.buckets == 1 || p.rule == EESD_RULE_CALIBRATED);
  const bool costs = p.num_costs >= 1 && p.num_costs <= INT32_MAX;
  if (p.batch < 0 || !rule || !buckets || !costs) return EESD_ERROR_SIZE;
  if (p.batch == 0) return EESD_OK;
  const bool given = p.alpha && p.beta && p.cap && p.costs && p.seed && p.position && p.length;
  return given ? EESD_OK : EESD_ERROR_NULL_POINTER;
}

inline eesd_status check_params(const eesd_thompson_look_params& p) {
  const bool costs = p.num_costs >= 1 && p.num_costs <= INT32_MAX;
  const bool buckets = p.buckets >= 1 && p.buckets <= INT32_MAX;
  if (p.batch < 0 || !buckets || !costs) return EESD_ERROR_SIZE;
  if (p.step < 0 || p.step >= p.num_costs) return EESD_ERROR_SIZE;
  if (p.batch == 0) return EESD_OK;
  const bool given = p.alpha && p.beta && p.cap && p.costs && p.seed && p.position && p.length &&
                     (p.bucket || p.num_costs == 1) && p.run && p.looking &&
                     (p.top_prob || p.step == 0);
  return given ? EESD_OK : EESD_ERROR_NULL_POINTER;
}

inline eesd_status check_params(const eesd_thompson_update_params& p) {
  if (p.batch < 0 || p.buckets < 1 || p.max_draft < 0) return EESD_ERROR_SIZE;
  if (p.batch == 0) return EESD_OK;
  // With no room for a draft there is nothing to read, and an empty tensor has no address.
  const bool bucket = p.bucket || p.buckets == 1 || p.max_draft == 0;
  const bool given =
      p.alpha && p.beta && p.prior_alpha && p.prior_beta && p.drafted && p.accepted && bucket;
  return given ? EESD_OK : EESD_ERROR_NULL_POINTER;
}

}  // namespace eesd
