#include "eesd/beta.h"

#include "cpu/kernels.h"

eesd_status eesd_sample_beta_cpu(const eesd_sample_beta_params* params) {
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_sample_beta_params& p = *params;
  if (p.n < 0 || p.buckets < 1 || p.n % p.buckets != 0) return EESD_ERROR_SIZE;
  if (p.n == 0) return EESD_OK;
  if (!p.alpha || !p.beta || !p.seed || !p.position || !p.out) return EESD_ERROR_NULL_POINTER;
  eesd::cpu::kernels().sample_beta(p);
  return EESD_OK;
}
