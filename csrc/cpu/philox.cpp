#include "eesd/philox.h"

#include "checks.h"
#include "cpu/kernels.h"
#include "eesd/random.h"

eesd_status eesd_philox_words_cpu(const eesd_philox_words_params* params) {
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_philox_words_params& p = *params;
  const eesd_status status = eesd::check_params(p);
  if (status != EESD_OK || p.n == 0) return status;

  const auto& kernels = eesd::cpu::kernels();
  for (int64_t r = 0; r < p.rows; ++r) {
    const uint32_t lo = eesd::philox_key_lo(p.seed[r]);
    const uint32_t hi = eesd::philox_key_hi(p.seed[r]);
    const uint32_t position = static_cast<uint32_t>(p.position[r]);
    const uint32_t base = static_cast<uint32_t>(p.base[r]);
    const uint32_t parent = p.parent ? static_cast<uint32_t>(p.parent[r]) : 0u;
    uint32_t* out = p.out + r * p.n;
    if (!p.ids) {
      kernels.philox_fill(lo, hi, eesd::philox_token_index(0, parent), position, base, p.purpose,
                          p.n, out);
      continue;
    }
    const int32_t* ids = p.ids + r * p.n;
    for (int64_t i = 0; i < p.n; ++i) {
      const eesd::philox_words w = eesd::philox4x32_10(
          lo, hi, eesd::philox_token_index(ids[i], parent), position, base, p.purpose);
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
      out[i] = words[ids[i] & 3];
    }
  }
  return EESD_OK;
}
