// Philox words in bulk, one a thread. Not tuned: kernels that need noise make it where they use it;
// this is for engines that want the words themselves, and for tests.
#include <cstdint>

#include "checks.h"
#include "cuda/launch.h"
#include "eesd/philox.h"
#include "eesd/random.h"

namespace eesd::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void philox_words_kernel(eesd_philox_words_params p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * p.n) return;
  const int64_t row = divide(i, p.n), column = i - row * p.n;
  const int32_t id = p.ids ? p.ids[i] : static_cast<int32_t>(column);
  const uint32_t parent = p.parent ? static_cast<uint32_t>(p.parent[row]) : 0u;
  const philox_words w = philox4x32_10(
      philox_key_lo(p.seed[row]), philox_key_hi(p.seed[row]), philox_token_index(id, parent),
      static_cast<uint32_t>(p.position[row]), static_cast<uint32_t>(p.base[row]), p.purpose);
  const uint32_t low = id & 1 ? w.y : w.x, high = id & 1 ? w.w : w.z;
  p.out[i] = id & 2 ? high : low;
}

}  // namespace
}  // namespace eesd::cuda

eesd_status eesd_philox_words_cuda(const eesd_philox_words_params* params, void* stream) {
  using namespace eesd::cuda;
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_philox_words_params& p = *params;
  const eesd_status status = eesd::check_params(p);
  if (status != EESD_OK || p.rows == 0 || p.n == 0) return status;
  if (p.rows > kMaxBlocks * kThreads / p.n) return EESD_ERROR_SIZE;
  const int64_t blocks = blocks_for(p.rows * p.n, kThreads);
  philox_words_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_of(stream)>>>(p);
  return launched();
}
