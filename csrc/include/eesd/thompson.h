// How many tokens to draft, from Beta posteriors over the chance that a drafted token is accepted
// given that all before it were: Thompson sampling, one call a round (calibrated: one a draft
// step). eesd_kernels/reference/thompson_*.py are the specification; here is the arithmetic that
// the CPU and CUDA share, in float64 and in one order, so that lengths agree bit for bit.
//
//   E(l) = 1 + theta + .. + theta^l   tokens expected of a round of draft length l
//   C(l)                              what such a round costs, in any unit
//
// Nothing here reads or writes out of range whatever the tensors hold: a cap counts as at most
// num_costs - 1, and a row whose posterior is not positive and finite drafts nothing and has no
// part in the others' choice.
#pragma once

#include <cstdint>

#include "eesd/beta.h"
#include "eesd/philox.h"
#include "eesd/status.h"

namespace eesd {

// The sum over a batch runs in lanes (row b in lane b mod 32, ascending) that a halving tree joins:
// a warp's shuffles and a plain loop give the same bits, whatever the batch.
constexpr int kPlanLanes = 32;

struct expected_tokens {
  double power;  // theta^l
  double total;  // E(l)
};

EESD_HD expected_tokens tokens_start() { return expected_tokens{1.0, 1.0}; }

EESD_HD expected_tokens tokens_advance(expected_tokens e, double theta, int64_t steps) {
  for (; steps > 0; --steps) {
    e.power *= theta;
    e.total += e.power;
  }
  return e;
}

EESD_HD int64_t clamp_cap(int32_t cap, int64_t num_costs) {
  return cap < num_costs ? cap : num_costs - 1;
}

// What a row's length is planned from. Calibrated: the marginal posterior, all buckets pooled,
// drawn at the index after the last bucket's. A prior that is split over the buckets makes it the
// very posterior that `cost` would hold.
struct plan_posterior {
  float alpha, beta;
  uint32_t index;
};

EESD_HD plan_posterior pooled_posterior(const float* alpha, const float* beta, int64_t buckets) {
  double a = 0.0, b = 0.0;
  for (int64_t j = 0; j < buckets; ++j) {
    a += static_cast<double>(alpha[j]);
    b += static_cast<double>(beta[j]);
  }
  return plan_posterior{static_cast<float>(a), static_cast<float>(b),
                        static_cast<uint32_t>(buckets)};
}

// A draw, or -1 where the posterior is no posterior.
EESD_HD float draw_theta(const plan_posterior& post, int64_t seed, int32_t position) {
  if (!beta_shape_ok(post.alpha) || !beta_shape_ok(post.beta)) return -1.0f;
  return sample_beta_one(post.alpha, post.beta, seed, static_cast<uint32_t>(position), post.index);
}

// bernoulli: theta is drawn afresh for each step, and a coin of that chance says whether to go on.
EESD_HD bool bernoulli_goes_on(float alpha, float beta, int64_t seed, int32_t position,
                               uint32_t step) {
  const float theta = draw_theta(plan_posterior{alpha, beta, step}, seed, position);
  const philox_words coin = philox4x32_10(philox_key_lo(seed), philox_key_hi(seed), step,
                                          static_cast<uint32_t>(position), 0u, PHILOX_PLAN);
  return philox_uniform24(coin.x) < theta;
}

// calibrated: the bucket of a top probability, equal parts of [0, 1]; -1 for NaN and negatives.
EESD_HD int32_t probability_bucket(float p, int64_t buckets) {
  if (!(p >= 0.0f)) return -1;
  if (p >= 1.0f) return static_cast<int32_t>(buckets - 1);
  const int32_t j = static_cast<int32_t>(p * static_cast<float>(buckets));
  return j < buckets ? j : static_cast<int32_t>(buckets - 1);
}

// A credit is what a sequence may still lose to drafts, in plain steps (rounds of length 0). A
// round is paid when it is planned, C(l) / C(0); each token that it emits brings token_credit, one
// and a little. One token is certain, so a draft is within the credit where C(l) - C(0) <= credit
// C(0). A credit that starts at s thus never ends a round below 0: n tokens never take more than
// s + token_credit n plain steps, and never more than credit_limit + token_credit n from any moment
// on, whatever came before.
EESD_HD bool credit_ok(float credit) { return credit - credit == 0.0f; }  // finite

EESD_HD bool affordable(double more, double credit, double plain) { return more <= credit * plain; }

constexpr double kNoLimit = 1.7976931348623157e308;

// calibrated, before exit step n + 1: does some longer draft, of those that cost at most `limit`
// more, promise a better rate than n tokens?
EESD_HD bool worth_a_look(double theta, double reach, double expected, int64_t n, int64_t cap,
                          const float* costs, double limit) {
  expected_tokens e{reach, expected};
  for (int64_t l = n + 1; l <= cap; ++l) {
    if (!(static_cast<double>(costs[l]) - static_cast<double>(costs[n]) <= limit)) return false;
    e = tokens_advance(e, theta, 1);
    if (e.total * static_cast<double>(costs[n]) > expected * static_cast<double>(costs[l])) {
      return true;
    }
  }
  return false;
}

// calibrated, after exit step n: the look is paid for; is token n, reached with `reach`, too?
EESD_HD bool worth_including(double reach, double expected, int64_t n, const float* costs,
                             double exit_cost) {
  const double before = static_cast<double>(costs[n - 1]), after = static_cast<double>(costs[n]);
  return reach * (before + exit_cost) > expected * (after - before - exit_cost);
}

}  // namespace eesd

extern "C" {

typedef enum eesd_rule {
  EESD_RULE_BERNOULLI = 0,
  EESD_RULE_COST = 1,       // one L maximises sum_b E_b(min(L, cap_b)) / C(L)
  EESD_RULE_CONSTANT = 2,   // the cap
  EESD_RULE_CALIBRATED = 3  // cost on the pooled buckets: where eesd_thompson_look starts from
} eesd_rule;

// With cost and calibrated, `credit` bounds the round: its rows share their credit, L is the best
// length with C(L) - C(0) <= mean C(0), and each row is left with mean - C(L) / C(0) for
// eesd_thompson_update to add to. Rows whose credit is not finite draft nothing and have no part.
typedef struct eesd_thompson_draft_length_params {
  const float* alpha;       // [batch], calibrated: [batch, buckets]
  const float* beta;        // the same
  const int32_t* cap;       // [batch] longest draft allowed; negative: not in this round
  const float* costs;       // [num_costs] C(0), C(1), ..: positive
  const int64_t* seed;      // [batch]
  const int32_t* position;  // [batch]
  int64_t batch;
  int64_t buckets;    // 1 but for calibrated
  int64_t num_costs;  // at least 1
  int32_t rule;       // an eesd_rule
  int32_t* length;    // [batch] 0 to cap; 0 for rows that are not in the round
  float* credit;      // [batch] plain steps, in place; or null: no bound
} eesd_thompson_draft_length_params;

// One draft step of the calibrated rule. Call with step = 0 before the first exit step and with
// step = i after the i-th; `looking` then says which rows take the next. Step 0 writes all of
// length, bucket, run and looking; step i changes the rows that were looking. Each row pays for
// itself from its `credit`: 1 at step 0, exit_cost / C(0) for a look, the rest of a token's cost
// when it is included; it looks where it can pay for both.
typedef struct eesd_thompson_look_params {
  const float* alpha;       // [batch, buckets]
  const float* beta;        // [batch, buckets]
  const int32_t* cap;       // [batch]; negative: not in this round
  const float* costs;       // [num_costs] C(0), C(1), ..: positive
  double exit_cost;         // what one look (exit step) costs, in the unit of costs
  const int64_t* seed;      // [batch]
  const int32_t* position;  // [batch]
  const float* top_prob;    // [batch] the exit's largest probability; not read by step 0
  int64_t batch, buckets;
  int64_t num_costs;  // K + 1
  int64_t step;       // 0 to K
  int32_t* length;    // [batch] tokens included so far
  int32_t* bucket;    // [batch, K] of each included token; -1 past them
  float* run;         // [batch, 3]: chance that all included are accepted, E so far, theta
  int32_t* looking;   // [batch] 1: take the next exit step
  float* credit;      // [batch] plain steps, in place; or null: no bound
} eesd_thompson_look_params;

// After a round with m accepted of l drafted, in place:
//   alpha = a0 + g (alpha - a0) + successes,  beta = b0 + g (beta - b0) + failures
// without buckets m successes and [m < l] failures; with them, tokens 1..m each succeed in their
// bucket and token m + 1 fails in its. credit grows by (m + 1) token_credit, to credit_limit at
// most. Rows with a negative l stay as they are.
typedef struct eesd_thompson_update_params {
  float* alpha;              // [batch, buckets]
  float* beta;               // [batch, buckets]
  const float* prior_alpha;  // [batch, buckets]
  const float* prior_beta;   // [batch, buckets]
  const int32_t* drafted;    // [batch] l
  const int32_t* accepted;   // [batch] m
  const int32_t* bucket;     // [batch, max_draft], or null where buckets is 1
  int64_t batch, buckets, max_draft;
  float discount;       // g
  float* credit;        // [batch] plain steps, or null
  double token_credit;  // what a token brings, in plain steps
  double credit_limit;  // what may be saved up; infinity: all
} eesd_thompson_update_params;

eesd_status eesd_thompson_draft_length_cpu(const eesd_thompson_draft_length_params* params);
eesd_status eesd_thompson_look_cpu(const eesd_thompson_look_params* params);
eesd_status eesd_thompson_update_cpu(const eesd_thompson_update_params* params);

// Device pointers and a cudaStream_t of the current device: one launch, no allocation, no
// synchronisation. In the library where it was built with CUDA (EESD_WITH_CUDA).
eesd_status eesd_thompson_draft_length_cuda(const eesd_thompson_draft_length_params* params,
                                            void* stream);
eesd_status eesd_thompson_look_cuda(const eesd_thompson_look_params* params, void* stream);
eesd_status eesd_thompson_update_cuda(const eesd_thompson_update_params* params, void* stream);
}

namespace eesd {

// One row of eesd_thompson_look.
EESD_HD void look_row(const eesd_thompson_look_params& p, int64_t b) {
  const int64_t max_draft = p.num_costs - 1, cap = clamp_cap(p.cap[b], p.num_costs);
  const float *alpha = p.alpha + b * p.buckets, *beta = p.beta + b * p.buckets;
  int32_t* bucket = p.bucket + b * max_draft;
  float* run = p.run + b * 3;
  const double plain = static_cast<double>(p.costs[0]);
  float credit = p.credit ? p.credit[b] : 0.0f;
  if (p.step == 0) {
    if (cap >= 0) credit -= 1.0f;
    p.length[b] = 0;
    for (int64_t i = 0; i < max_draft; ++i) bucket[i] = -1;
    run[0] = run[1] = 1.0f;
    run[2] = draw_theta(pooled_posterior(alpha, beta, p.buckets), p.seed[b], p.position[b]);
  } else {
    if (!p.looking[b]) return;
    p.looking[b] = 0;
    const int32_t j = probability_bucket(p.top_prob[b], p.buckets);
    if (j < 0) return;
    const plan_posterior post{alpha[j], beta[j], static_cast<uint32_t>(j)};
    const double theta = draw_theta(post, p.seed[b], p.position[b]);
    const double reach = static_cast<double>(run[0]) * theta, expected = run[1];
    if (theta < 0.0 || p.step > cap ||
        !worth_including(reach, expected, p.step, p.costs, p.exit_cost)) {
      return;
    }
    p.length[b] = static_cast<int32_t>(p.step);
    bucket[p.step - 1] = j;
    run[0] = static_cast<float>(reach);
    run[1] = static_cast<float>(expected + reach);
    const double token = static_cast<double>(p.costs[p.step]) -
                         static_cast<double>(p.costs[p.step - 1]) - p.exit_cost;
    credit = static_cast<float>(static_cast<double>(credit) - token / plain);
  }
  const double limit = p.credit ? (static_cast<double>(credit) + 1.0) * plain : kNoLimit;
  const bool looks = run[2] >= 0.0f && credit_ok(credit) &&
                     worth_a_look(run[2], run[0], run[1], p.step, cap, p.costs, limit);
  p.looking[b] = looks ? 1 : 0;
  if (looks) credit = static_cast<float>(static_cast<double>(credit) - p.exit_cost / plain);
  if (p.credit) p.credit[b] = credit;
}

// One element of eesd_thompson_update: bucket j of row b.
EESD_HD void update_element(const eesd_thompson_update_params& p, int64_t b, int64_t j) {
  const int32_t drafted = p.drafted[b], accepted = p.accepted[b];
  if (drafted < 0) return;
  int32_t successes = accepted, failures = accepted < drafted ? 1 : 0;
  if (p.bucket) {
    const int32_t* bucket = p.bucket + b * p.max_draft;
    successes = 0;
    for (int64_t i = 0; i < accepted && i < p.max_draft; ++i) successes += bucket[i] == j;
    const bool seen = accepted >= 0 && accepted < drafted && accepted < p.max_draft;
    failures = seen && bucket[accepted] == j;
  }
  if (p.credit && j == 0) {
    const double tokens = static_cast<double>(accepted) + 1.0;
    const double credit = static_cast<double>(p.credit[b]) + tokens * p.token_credit;
    p.credit[b] = static_cast<float>(credit > p.credit_limit ? p.credit_limit : credit);
  }
  const int64_t e = b * p.buckets + j;
  const float a0 = p.prior_alpha[e], b0 = p.prior_beta[e];
  p.alpha[e] = a0 + p.discount * (p.alpha[e] - a0) + static_cast<float>(successes);
  p.beta[e] = b0 + p.discount * (p.beta[e] - b0) + static_cast<float>(failures);
}

}  // namespace eesd
