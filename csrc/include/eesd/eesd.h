// Everything a C++ engine needs. Headers meant for kernels (philox.h, mathf.h) come along.
#pragma once

#include "eesd/beta.h"
#include "eesd/decoder.h"
#include "eesd/draft.h"
#include "eesd/linear.h"
#include "eesd/philox.h"
#include "eesd/random.h"
#include "eesd/status.h"
#include "eesd/thompson.h"
#include "eesd/threads.h"
#include "eesd/verify.h"
