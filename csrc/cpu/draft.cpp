#include "eesd/draft.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "eesd/philox.h"

namespace eesd::cpu {
namespace {

constexpr int64_t kMaxCandidates = 64;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// An insertion sort of the best so far: nearly every logit is below the k-th and costs one compare.
void select_topk(const float* logits, int64_t vocab, int64_t k, float* values, int32_t* ids) {
  int64_t filled = 0;
  for (int64_t id = 0; id < vocab; ++id) {
    const float x = logits[id];
    if (filled == k && !(x > values[k - 1])) continue;
    int64_t at = filled < k ? filled++ : k - 1;
    for (; at > 0 && values[at - 1] < x; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = x;
    ids[at] = static_cast<int32_t>(id);
  }
}

double race_noise(const eesd_sample_draft_params& p, int64_t row, int32_t id) {
  const bool coupled = p.law[row] == EESD_LAW_COUPLED;
  const uint32_t parent = p.parent && !coupled ? static_cast<uint32_t>(p.parent[row]) : 0u;
  const uint32_t base = coupled ? 0u : static_cast<uint32_t>(p.base[row]);
  const philox_words w = philox4x32_10(
      philox_key_lo(p.seed[row]), philox_key_hi(p.seed[row]), philox_token_index(id, parent),
      static_cast<uint32_t>(p.position[row]), base, coupled ? PHILOX_TARGET : PHILOX_DRAFT);
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
  return -std::log1p(-static_cast<double>(philox_race_uniform(words[id & 3])));
}

void draw_row(const eesd_sample_draft_params& p, int64_t row) {
  const float* values = p.values + row * p.k;
  const int32_t* ids = p.ids + row * p.k;
  int32_t* children = p.child_ids + row * p.n;
  float* probs = p.probs + row * p.k;
  std::fill(children, children + p.n, -1);
  std::fill(probs, probs + p.k, 0.0f);

  const double temperature = p.temperature[row];
  const bool warm = temperature > 0;
  double score[kMaxCandidates], top = -kInfinity;
  int64_t best = -1;
  for (int64_t i = 0; i < p.k; ++i) {
    const bool valid = ids[i] >= 0 && values[i] > -kInfinity;  // NaN fails
    score[i] = !valid ? -kInfinity : warm ? values[i] / temperature : values[i];
    if (score[i] > top) {
      top = score[i];
      best = i;
    }
  }
  if (best < 0) return;
  if (warm) {
    double total = 0;
    for (int64_t i = 0; i < p.k; ++i) total += std::exp(score[i] - top);
    for (int64_t i = 0; i < p.k; ++i) {
      probs[i] = static_cast<float>(std::exp(score[i] - top) / total);
    }
  } else {
    probs[best] = 1.0f;
  }
  if (warm && p.law[row] != EESD_LAW_DETERMINISTIC) {
    for (int64_t i = 0; i < p.k; ++i) {
      if (score[i] > -kInfinity) score[i] -= std::log(race_noise(p, row, ids[i]));
    }
  }
  for (int64_t c = 0; c < p.n; ++c) {
    const double* winner = std::max_element(score, score + p.k);  // the first of equals
    if (*winner == -kInfinity) return;
    children[c] = ids[winner - score];
    score[winner - score] = -kInfinity;
  }
}

}  // namespace
}  // namespace eesd::cpu

eesd_status eesd_topk_logsumexp_cpu(const eesd_topk_logsumexp_params* params) {
  using namespace eesd::cpu;
  const eesd_topk_logsumexp_params& p = *params;
  if (p.rows < 0 || p.k < 1 || p.k > p.vocab || p.k > kMaxCandidates) return EESD_ERROR_SIZE;
  const auto logsumexp = kernels().logsumexp_row;
  for (int64_t r = 0; r < p.rows; ++r) {
    float* values = p.values + r * p.k;
    int32_t* ids = p.ids + r * p.k;
    p.logsumexp[r] = logsumexp(p.logits + r * p.vocab, p.vocab);
    if (std::isfinite(p.logsumexp[r])) {
      select_topk(p.logits + r * p.vocab, p.vocab, p.k, values, ids);
    } else {
      p.logsumexp[r] = std::numeric_limits<float>::quiet_NaN();
      std::fill(values, values + p.k, p.logsumexp[r]);
      std::fill(ids, ids + p.k, -1);
    }
  }
  return EESD_OK;
}

eesd_status eesd_sample_draft_cpu(const eesd_sample_draft_params* params) {
  using namespace eesd::cpu;
  const eesd_sample_draft_params& p = *params;
  if (p.rows < 0 || p.n < 1 || p.n > p.k || p.k > kMaxCandidates) return EESD_ERROR_SIZE;
  for (int64_t r = 0; r < p.rows; ++r) draw_row(p, r);
  return EESD_OK;
}
