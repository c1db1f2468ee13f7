#include "eesd/status.h"

const char* eesd_status_string(eesd_status status) {
  switch (status) {
    case EESD_OK:
      return "ok";
    case EESD_ERROR_NULL_POINTER:
      return "a required pointer is null";
    case EESD_ERROR_SIZE:
      return "a size is negative, zero where it must not be, or out of range";
    case EESD_ERROR_STRIDE:
      return "a row stride is smaller than the row";
    case EESD_ERROR_DTYPE:
      return "the dtype is not supported here";
    case EESD_ERROR_OUT_OF_MEMORY:
      return "out of memory";
    case EESD_ERROR_CUDA:
      return "a CUDA call failed";
  }
  return "unknown status";
}

const char* eesd_version(void) { return EESD_VERSION; }
