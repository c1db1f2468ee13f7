// Error codes of every eesd function. Nothing in the library throws, prints or exits.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef enum eesd_status {
  EESD_OK = 0,
  EESD_ERROR_NULL_POINTER = 1,   // a required pointer is null
  EESD_ERROR_SIZE = 2,           // a negative size, or a product of sizes out of range
  EESD_ERROR_STRIDE = 3,         // a row stride smaller than the row
  EESD_ERROR_DTYPE = 4,          // an eesd_dtype the function does not take
  EESD_ERROR_OUT_OF_MEMORY = 5,  // scratch memory could not be had
  EESD_ERROR_CUDA = 6            // a launch failed
} eesd_status;

typedef enum eesd_dtype { EESD_FLOAT32 = 0, EESD_BFLOAT16 = 1 } eesd_dtype;

// A static, lower-case English sentence without a full stop. Never null.
const char* eesd_status_string(eesd_status status);

// "major.minor.patch".
const char* eesd_version(void);

#ifdef __cplusplus
}
#endif
