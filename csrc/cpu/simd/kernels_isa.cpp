// Compiled once per instruction set, with EESD_ISA naming it (CMakeLists.txt). No inline function
// of the standard library may be emitted here: the linker could pick its AVX-512 copy for all.
#include "cpu/kernels.h"
#include "cpu/simd/decoder_kernel.h"
#include "cpu/simd/linear_kernel.h"
#include "cpu/simd/random_kernel.h"

#define EESD_JOIN_(a, b) a##b
#define EESD_JOIN(a, b) EESD_JOIN_(a, b)
#define EESD_TEXT_(a) #a
#define EESD_TEXT(a) EESD_TEXT_(a)

namespace eesd::cpu {

extern const kernel_table EESD_JOIN(kernels_, EESD_ISA) = {
    EESD_TEXT(EESD_ISA), 2 * kLanes,    pack_x_f32,  pack_x_bf16,  linear_f32,
    linear_bf16,         philox_fill,   sample_beta, rms_norm_f32, rms_norm_bf16,
    swiglu_row,          logsumexp_row, attend_row,
};

}  // namespace eesd::cpu
