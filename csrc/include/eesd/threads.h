// The library's own small thread pool (it does not link OpenMP: a second OpenMP runtime beside
// the host program's would oversubscribe the cores). Results never depend on the thread count.
#pragma once

#include "eesd/status.h"

#ifdef __cplusplus
extern "C" {
#endif

// Threads a large product may use, the caller included; 1 runs everything on the caller.
// Default: OMP_NUM_THREADS where set, else the CPUs this process may run on; at most 64.
eesd_status eesd_set_num_threads(int count);
int eesd_get_num_threads(void);

// The instruction set picked at run time: "avx512", "avx2" or "generic". The environment variable
// EESD_ISA, read once, can only lower the choice (for tests).
const char* eesd_cpu_isa(void);

#ifdef __cplusplus
}
#endif
