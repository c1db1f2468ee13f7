#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

#include "eesd/threads.h"

namespace eesd::cpu {
namespace {

const kernel_table& choose() {
#if defined(EESD_X86_SIMD)
  const char* wanted = std::getenv("EESD_ISA");
  const bool generic = wanted && std::strcmp(wanted, "generic") == 0;
  const bool at_most_avx2 = wanted && std::strcmp(wanted, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && !generic && !at_most_avx2) return kernels_avx512;
  if (avx2 && !generic) return kernels_avx2;
#endif
  return kernels_generic;
}

}  // namespace

const kernel_table& kernels() {
  static const kernel_table& table = choose();
  return table;
}

}  // namespace eesd::cpu

const char* eesd_cpu_isa(void) { return eesd::cpu::kernels().isa; }
