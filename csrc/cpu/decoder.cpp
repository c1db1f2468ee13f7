#include "eesd/decoder.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace eesd::cpu {
namespace {

// Multiply-adds below which one thread is quicker than waking another.
constexpr int64_t kAloneWork = 1 << 16;

struct AttentionJob {
  const eesd_tree_attention_params* p;
  decltype(kernel_table::attend_row) attend;
  std::atomic<bool> failed;
};

// One sequence, row and head. A tree node's ancestors are visited in node order, which is depth
// order, after the cached slots: the same sums as if they stood in the cache.
void attend_one(void* context, int64_t index) {
  AttentionJob& job = *static_cast<AttentionJob*>(context);
  const eesd_tree_attention_params& p = *job.p;
  const int64_t head = index % p.heads, row = index / p.heads % p.rows,
                b = index / p.heads / p.rows;
  float* out = p.out + index * p.head_size;
  if (row >= p.num_rows[b]) {
    std::fill(out, out + p.head_size, 0.0f);
    return;
  }
  const int64_t length = p.lengths[b], kv_head = head / (p.heads / p.kv_heads);
  int64_t offset = b * p.batch_stride + kv_head * p.head_size;
  static thread_local std::vector<float> scores;
  static thread_local std::vector<int32_t> slots;
  const int32_t* slot = nullptr;
  int64_t count = length + row + 1;
  try {
    if (static_cast<int64_t>(scores.size()) < count) scores.resize(2 * count);
    if (p.ancestry) {
      if (static_cast<int64_t>(slots.size()) < count) slots.resize(2 * count);
      for (int64_t s = 0; s < length; ++s) slots[s] = static_cast<int32_t>(s);
      count = length;
      // A node sees no later one: bits above its own are not looked at.
      const uint64_t mask = static_cast<uint64_t>(p.ancestry[b * p.rows + row]);
      for (int64_t j = 0; j <= row; ++j) {
        if (mask >> j & 1) slots[count++] = static_cast<int32_t>(length + j);
      }
      slot = slots.data();
    }
    // In place and in a list alike, a position is its index; the last is the row's own.
    const int64_t hidden = p.window ? std::max<int64_t>(count - p.window, 0) : 0;
    count -= hidden;
    if (slot) {
      slot += hidden;
    } else {
      offset += hidden * p.kv_heads * p.head_size;
    }
  } catch (const std::bad_alloc&) {
    job.failed = true;
    return;
  }
  job.attend(p.q + index * p.head_size, p.k_cache + offset, p.v_cache + offset,
             p.kv_heads * p.head_size, slot, count, p.head_size, p.scale, scores.data(), out);
}

template <class Params>
bool block_fits(const Params& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t live = p.num_rows[b];
    if (live < 0 || live > p.rows || p.lengths[b] < 0) return false;
    if (live && p.lengths[b] + live > p.slots) return false;
  }
  return true;
}

void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i] + a * sin[i];
  }
}

}  // namespace
}  // namespace eesd::cpu

eesd_status eesd_rms_norm_cpu(const eesd_rms_norm_params* params) {
  const eesd_rms_norm_params& p = *params;
  if (p.rows < 0 || p.size < 1) return EESD_ERROR_SIZE;
  const auto& k = eesd::cpu::kernels();
  const auto row = p.weight_dtype == EESD_BFLOAT16 ? k.rms_norm_bf16 : k.rms_norm_f32;
  for (int64_t r = 0; r < p.rows; ++r)
    row(p.x + r * p.size, p.weight, p.eps, p.size, p.out + r * p.size);
  return EESD_OK;
}

eesd_status eesd_swiglu_cpu(const eesd_swiglu_params* params) {
  const eesd_swiglu_params& p = *params;
  if (p.rows < 0 || p.size < 0) return EESD_ERROR_SIZE;
  const auto row = eesd::cpu::kernels().swiglu_row;
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* gate = p.gate_up + 2 * r * p.size;
    row(gate, gate + p.size, p.size, p.out + r * p.size);
  }
  return EESD_OK;
}

eesd_status eesd_rope_cache_write_cpu(const eesd_rope_cache_write_params* params) {
  using namespace eesd::cpu;
  const eesd_rope_cache_write_params& p = *params;
  if (!block_fits(p)) return EESD_ERROR_SIZE;
  const int64_t half = p.head_size / 2, token = p.kv_heads * p.head_size;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t row = b * p.rows + i;
      float* q_out = p.q_out + row * p.heads * p.head_size;
      if (i >= p.num_rows[b]) {
        std::fill(q_out, q_out + p.heads * p.head_size, 0.0f);
        continue;
      }
      const int64_t at = p.lengths[b] + (p.depth ? p.depth[row] : i);
      if (at < 0 || at >= p.positions) return EESD_ERROR_SIZE;
      const float *cos = p.cos + at * half, *sin = p.sin + at * half;
      const float* in = p.qkv + row * (p.heads + 2 * p.kv_heads) * p.head_size;
      const int64_t slot = b * p.batch_stride + (p.lengths[b] + i) * token;
      for (int64_t h = 0; h < p.heads; ++h, in += p.head_size) {
        rotate(in, cos, sin, half, q_out + h * p.head_size);
      }
      for (int64_t h = 0; h < p.kv_heads; ++h, in += p.head_size) {
        rotate(in, cos, sin, half, p.k_cache + slot + h * p.head_size);
      }
      std::copy(in, in + token, p.v_cache + slot);
    }
  }
  return EESD_OK;
}

eesd_status eesd_tree_attention_cpu(const eesd_tree_attention_params* params) {
  using namespace eesd::cpu;
  const eesd_tree_attention_params& p = *params;
  if (p.kv_heads < 1 || p.heads % p.kv_heads || !block_fits(p)) return EESD_ERROR_SIZE;
  if (p.window < 0 || (p.ancestry && p.rows > 64)) return EESD_ERROR_SIZE;
  AttentionJob job{&p, kernels().attend_row, {false}};
  int64_t work = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    work += static_cast<int64_t>(p.num_rows[b]) * p.lengths[b] * p.heads * p.head_size;
  }
  const int64_t count = p.batch * p.rows * p.heads;
  if (work < kAloneWork) {
    for (int64_t i = 0; i < count; ++i) attend_one(&job, i);
  } else {
    run_chunks(count, attend_one, &job);
  }
  return job.failed ? EESD_ERROR_OUT_OF_MEMORY : EESD_OK;
}
