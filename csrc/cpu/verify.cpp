#include "eesd/verify.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <new>
#include <vector>

#include "cpu/kernels.h"
#include "eesd/philox.h"

namespace eesd::cpu {
namespace {

// One row's law, and room for what its draw needs.
struct Row {
  std::vector<double> p, scratch, r, w;
  std::vector<uint32_t> words;
  std::vector<int32_t> ids;
};

// The first of the largest logits, or -1 for a row with NaN or +inf or no finite logit.
int32_t argmax(const float* logits, int64_t vocab) {
  float top = -INFINITY;
  int32_t best = -1;
  bool nan = false;
  for (int64_t i = 0; i < vocab; ++i) {
    nan |= logits[i] != logits[i];
    if (logits[i] > top) {
      top = logits[i];
      best = static_cast<int32_t>(i);
    }
  }
  return nan || top == INFINITY ? -1 : best;
}

// Temperature, top-k, top-p, min-p; ties at a threshold are kept. The row has a finite maximum.
void target_law(const float* logits, float top, int64_t vocab, double temperature, int32_t top_k,
                double top_p, double min_p, Row& row) {
  std::vector<double>& p = row.p;
  p.resize(vocab);
  float kth = -INFINITY;
  if (top_k > 0 && top_k < vocab) {
    row.scratch.assign(logits, logits + vocab);
    const auto at = row.scratch.begin() + (top_k - 1);
    std::nth_element(row.scratch.begin(), at, row.scratch.end(), std::greater<double>());
    kth = static_cast<float>(*at);
  }
  double total = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    const double x = (static_cast<double>(logits[i]) - top) / temperature;
    p[i] = logits[i] < kth ? 0.0 : std::exp(x);
    total += p[i];
  }
  for (double& x : p) x /= total;
  if (top_p < 1) {
    row.scratch = p;
    std::sort(row.scratch.begin(), row.scratch.end(), std::greater<double>());
    double before = 0, threshold = row.scratch[0];
    for (const double x : row.scratch) {
      if (before >= top_p) break;
      threshold = x;
      before += x;
    }
    for (double& x : p) x = x < threshold ? 0.0 : x;
  }
  if (min_p > 0) {
    const double least = min_p * *std::max_element(p.begin(), p.end());
    for (double& x : p) x = x < least ? 0.0 : x;
  }
  if (top_p < 1 || min_p > 0) {
    total = 0;
    for (const double x : p) total += x;
    for (double& x : p) x /= total;
  }
}

struct Place {
  uint32_t key_lo, key_hi, position, base;

  double accept_uniform(uint32_t sibling) const {
    const philox_words w = philox4x32_10(key_lo, key_hi, sibling, position, base, PHILOX_ACCEPT);
    return philox_uniform24(w.x);
  }

  // argmin E_x / r(x): an exponential race in which x wins with probability r(x) / sum r.
  int32_t race(const std::vector<double>& r, std::vector<uint32_t>& words) const {
    const int64_t vocab = static_cast<int64_t>(r.size());
    words.resize(vocab);
    kernels().philox_fill(key_lo, key_hi, 0, position, base, PHILOX_TARGET, vocab, words.data());
    double first = std::numeric_limits<double>::infinity();
    int32_t winner = -1;
    for (int64_t i = 0; i < vocab; ++i) {
      if (!(r[i] > 0)) continue;
      const double u = static_cast<double>(philox_race_uniform(words[i]));
      const double finish = -std::log1p(-u) / r[i];
      if (finish < first) {
        first = finish;
        winner = static_cast<int32_t>(i);
      }
    }
    return winner;
  }
};

// NodeWalk of the reference with one child: true where `draft` is accepted; else row.p becomes the
// law that the token in its place is drawn from.
bool accept_or_subtract(const eesd_verify_linear_params& p, int64_t b, int64_t j, int32_t draft,
                        const Place& place, Row& row) {
  const bool sampled = p.law[b] == EESD_LAW_SAMPLED;
  row.ids.clear();
  row.w.clear();
  if (sampled) {
    const int64_t first = (b * p.drafts + j) * p.k;
    for (int64_t i = first; i < first + p.k; ++i) {
      if (p.q_ids[i] < 0) continue;
      row.ids.push_back(p.q_ids[i]);
      row.w.push_back(p.q_probs[i]);
    }
  } else {
    row.ids.push_back(draft);
    row.w.push_back(1.0);
  }
  const auto found = std::find(row.ids.begin(), row.ids.end(), draft);
  if (found == row.ids.end()) return false;  // its law cannot have drawn it: p stays
  const size_t child = found - row.ids.begin();
  double s = 0, total = 0;
  for (const double x : row.p) s += x;
  for (const double x : row.w) total += x;
  const double u = place.accept_uniform(0), r = row.p[draft];
  if (sampled ? u * row.w[child] * s < r * total : u * s < r) return true;
  // A residual without mass can only be rounding: p and q are then equal, and p is drawn from.
  row.scratch = row.p;
  if (sampled) {
    for (size_t i = 0; i < row.ids.size(); ++i) {
      double& x = row.scratch[row.ids[i]];
      x = std::max(x - s * row.w[i] / total, 0.0);
    }
  }
  row.scratch[draft] = 0.0;
  double left = 0;
  for (const double x : row.scratch) left += x;
  if (left > 0) row.p.swap(row.scratch);
  return false;
}

void fail(const eesd_verify_linear_params& p, int64_t b) {
  int32_t* tokens = p.token_ids + b * (p.drafts + 1);
  std::fill(tokens, tokens + p.drafts + 1, -1);
  p.num_accepted[b] = 0;
  p.status[b] = 1;
}

void verify_one(const eesd_verify_linear_params& p, int64_t b, Row& row) {
  const int64_t width = p.drafts + 1;
  int32_t* tokens = p.token_ids + b * width;
  std::fill(tokens, tokens + width, -1);
  p.num_accepted[b] = p.status[b] = 0;
  const bool coupled = p.law[b] == EESD_LAW_COUPLED, greedy = p.temperature[b] == 0;
  for (int64_t j = 0; j <= p.draft_length[b]; ++j) {
    const float* logits = p.target_logits + (b * width + j) * p.vocab;
    const int32_t draft = j < p.draft_length[b] ? p.draft_ids[b * p.drafts + j] : -1;
    int32_t token = argmax(logits, p.vocab);
    if (token < 0) {
      fail(p, b);
      return;
    }
    bool accepted = token == draft;
    if (!greedy) {
      const Place place{philox_key_lo(p.seed[b]), philox_key_hi(p.seed[b]),
                        static_cast<uint32_t>(p.position[b] + j + 1),
                        coupled ? 0u : static_cast<uint32_t>(p.base[b])};
      target_law(logits, logits[token], p.vocab, p.temperature[b], p.top_k[b], p.top_p[b],
                 p.min_p[b], row);
      accepted = !coupled && draft >= 0 && accept_or_subtract(p, b, j, draft, place, row);
      token = accepted ? draft : place.race(row.p, row.words);
      if (coupled) accepted = token == draft;
      if (token < 0) {  // no mass: filters or a temperature that no caller may give
        fail(p, b);
        return;
      }
    }
    tokens[j] = token;
    if (!accepted) {
      p.num_accepted[b] = static_cast<int32_t>(j);
      return;
    }
  }
}

}  // namespace
}  // namespace eesd::cpu

eesd_status eesd_verify_linear_cpu(const eesd_verify_linear_params* params) {
  const eesd_verify_linear_params& p = *params;
  if (p.batch < 0 || p.drafts < 0 || p.vocab < 1) return EESD_ERROR_SIZE;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.law[b] < EESD_LAW_SAMPLED || p.law[b] > EESD_LAW_COUPLED) return EESD_ERROR_SIZE;
    if (p.draft_length[b] < 0 || p.draft_length[b] > p.drafts) return EESD_ERROR_SIZE;
    for (int64_t j = 0; j < p.draft_length[b]; ++j) {
      if (p.draft_ids[b * p.drafts + j] >= p.vocab) return EESD_ERROR_SIZE;
      const int32_t* ids = p.q_ids + (b * p.drafts + j) * p.k;
      for (int64_t i = 0; i < p.k; ++i) {
        if (ids[i] >= p.vocab) return EESD_ERROR_SIZE;
      }
    }
  }
  try {
    eesd::cpu::Row row;
    for (int64_t b = 0; b < p.batch; ++b) eesd::cpu::verify_one(p, b, row);
  } catch (const std::bad_alloc&) {
    return EESD_ERROR_OUT_OF_MEMORY;
  }
  return EESD_OK;
}
