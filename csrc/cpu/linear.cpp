#include "eesd/linear.h"

#include <algorithm>
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace eesd::cpu {
namespace {

// x rows per pass over the weight: their packed copy should stay in L2 beside the weight rows.
constexpr int64_t kRowsPerPass = 16;
// Bytes of weight per chunk, and the size of a product below which waking anyone costs more.
constexpr int64_t kChunkBytes = 32 << 10;
constexpr int64_t kAloneBytes = 48 << 10;
constexpr int64_t kWeightTile = 4;

// Grow-only scratch for packed x, one per calling thread.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* get(int64_t floats) {
    if (floats > capacity_) {
      std::free(data_);
      const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      capacity_ = data_ ? floats : 0;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

struct Job {
  linear_block block;
  void (*kernel)(const linear_block&, int64_t, int64_t);
  int64_t out_features, chunk;
};

void run_chunk(void* context, int64_t index) {
  const Job& job = *static_cast<const Job*>(context);
  const int64_t first = index * job.chunk;
  job.kernel(job.block, first, std::min(first + job.chunk, job.out_features));
}

bool product_fits(int64_t a, int64_t b) { return b == 0 || a <= (INT64_MAX >> 4) / b; }

eesd_status check(const eesd_linear_params& p) {
  if (p.rows < 0 || p.in_features < 0 || p.out_features < 0) return EESD_ERROR_SIZE;
  if (!product_fits(p.in_features, p.out_features)) return EESD_ERROR_SIZE;
  if (p.weight_dtype != EESD_FLOAT32 && p.weight_dtype != EESD_BFLOAT16) return EESD_ERROR_DTYPE;
  if (p.x_stride && p.x_stride < p.in_features) return EESD_ERROR_STRIDE;
  if (p.out_stride && p.out_stride < p.out_features) return EESD_ERROR_STRIDE;
  if (p.residual_stride && p.residual_stride < p.out_features) return EESD_ERROR_STRIDE;
  if (p.rows == 0 || p.out_features == 0) return EESD_OK;
  if (!p.out || (p.in_features && (!p.x || !p.weight))) return EESD_ERROR_NULL_POINTER;
  return EESD_OK;
}

}  // namespace
}  // namespace eesd::cpu

eesd_status eesd_linear_cpu(const eesd_linear_params* params) {
  using namespace eesd::cpu;
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_linear_params& p = *params;
  if (const eesd_status status = check(p)) return status;
  if (p.rows == 0 || p.out_features == 0) return EESD_OK;

  const kernel_table& k = kernels();
  const bool bf16 = p.weight_dtype == EESD_BFLOAT16;
  const int64_t padded = (p.in_features + k.pack_multiple - 1) / k.pack_multiple * k.pack_multiple;
  const int64_t x_stride = p.x_stride ? p.x_stride : p.in_features;
  static thread_local Scratch scratch;
  float* packed = scratch.get(std::max<int64_t>(1, std::min(p.rows, kRowsPerPass) * padded));
  if (!packed) return EESD_ERROR_OUT_OF_MEMORY;

  const int64_t row_bytes = std::max<int64_t>(1, p.in_features * (bf16 ? 2 : 4));
  const int64_t tiles = std::max<int64_t>(1, kChunkBytes / (row_bytes * kWeightTile));
  Job job{};
  job.kernel = bf16 ? k.linear_bf16 : k.linear_f32;
  job.out_features = p.out_features;
  job.chunk = row_bytes * p.out_features <= kAloneBytes ? p.out_features : tiles * kWeightTile;
  job.block.packed_x = packed;
  job.block.packed_stride = padded;
  job.block.weight = p.weight;
  job.block.in_features = p.in_features;
  job.block.residual_stride = p.residual_stride ? p.residual_stride : p.out_features;
  job.block.out_stride = p.out_stride ? p.out_stride : p.out_features;

  for (int64_t first = 0; first < p.rows; first += kRowsPerPass) {
    job.block.rows = std::min(kRowsPerPass, p.rows - first);
    job.block.residual = p.residual ? p.residual + first * job.block.residual_stride : nullptr;
    job.block.out = p.out + first * job.block.out_stride;
    for (int64_t r = 0; r < job.block.rows; ++r) {
      const float* x = p.x + (first + r) * x_stride;
      (bf16 ? k.pack_x_bf16 : k.pack_x_f32)(x, p.in_features, packed + r * padded);
    }
    run_chunks((p.out_features + job.chunk - 1) / job.chunk, run_chunk, &job);
  }
  return EESD_OK;
}
