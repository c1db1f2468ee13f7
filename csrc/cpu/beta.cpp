#include "eesd/beta.h"

#include "checks.h"
#include "cpu/kernels.h"

eesd_status eesd_sample_beta_cpu(const eesd_sample_beta_params* params) {
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_status status = eesd::check_params(*params);
  if (status == EESD_OK && params->n > 0) eesd::cpu::kernels().sample_beta(*params);
  return status;
}
