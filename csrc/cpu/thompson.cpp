#include "eesd/thompson.h"

#include "checks.h"

namespace eesd {
namespace {

constexpr int64_t kTile = 64;  // lengths whose sums are kept at once

double sum_lanes(double* lane) {
  for (int width = kPlanLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

plan_posterior row_posterior(const eesd_thompson_draft_length_params& p, int64_t b) {
  if (p.rule == EESD_RULE_CALIBRATED) {
    return pooled_posterior(p.alpha + b * p.buckets, p.beta + b * p.buckets, p.buckets);
  }
  return plan_posterior{p.alpha[b], p.beta[b], 0u};
}

bool in_round(const eesd_thompson_draft_length_params& p, int64_t b) {
  return p.cap[b] >= 0 && (!p.credit || credit_ok(p.credit[b]));
}

// One L for the batch. Rows that have no part in it are given length 0 on the way.
void plan_by_cost(const eesd_thompson_draft_length_params& p) {
  int64_t longest = 0, best_length = 0, rows = 0;
  double credits[kPlanLanes] = {};
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t cap = clamp_cap(p.cap[b], p.num_costs);
    longest = cap > longest ? cap : longest;
    if (!p.credit || !in_round(p, b)) continue;
    credits[b % kPlanLanes] += static_cast<double>(p.credit[b]);
    ++rows;
  }
  const double credit = sum_lanes(credits), plain = static_cast<double>(p.costs[0]);
  double best = 0.0, sums[kTile][kPlanLanes];
  for (int64_t tile = 0; tile <= longest; tile += kTile) {
    const int64_t end = longest + 1 < tile + kTile ? longest + 1 : tile + kTile;
    for (int64_t l = tile; l < end; ++l) {
      for (double& lane : sums[l - tile]) lane = 0.0;
    }
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t cap = clamp_cap(p.cap[b], p.num_costs);
      const float theta =
          in_round(p, b) ? draw_theta(row_posterior(p, b), p.seed[b], p.position[b]) : -1.0f;
      p.length[b] = theta < 0.0f ? 0 : static_cast<int32_t>(cap);
      if (theta < 0.0f) continue;
      expected_tokens e = tokens_advance(tokens_start(), theta, cap < tile ? cap : tile);
      for (int64_t l = tile; l < end; ++l) {
        if (l > tile && l <= cap) e = tokens_advance(e, theta, 1);
        sums[l - tile][b % kPlanLanes] += e.total;
      }
    }
    for (int64_t l = tile; l < end; ++l) {
      const double cost = static_cast<double>(p.costs[l]);
      const double more = (cost - plain) * static_cast<double>(rows);
      if (p.credit && !affordable(more, credit, plain)) continue;
      const double rate = sum_lanes(sums[l - tile]) / cost;
      if (rate > best) {
        best = rate;
        best_length = l;
      }
    }
  }
  float left = 0.0f;
  if (rows > 0) {
    const double price = static_cast<double>(p.costs[best_length]) / plain;
    left = static_cast<float>(credit / static_cast<double>(rows) - price);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.length[b] > best_length) p.length[b] = static_cast<int32_t>(best_length);
    if (p.credit && in_round(p, b)) p.credit[b] = left;
  }
}

void plan_row(const eesd_thompson_draft_length_params& p, int64_t b) {
  const int64_t cap = clamp_cap(p.cap[b], p.num_costs);
  int64_t length = cap > 0 ? cap : 0;
  if (p.rule == EESD_RULE_BERNOULLI) {
    for (length = 0; length < cap; ++length) {
      if (!bernoulli_goes_on(p.alpha[b], p.beta[b], p.seed[b], p.position[b],
                             static_cast<uint32_t>(length))) {
        break;
      }
    }
  }
  p.length[b] = static_cast<int32_t>(length);
}

}  // namespace
}  // namespace eesd

eesd_status eesd_thompson_draft_length_cpu(const eesd_thompson_draft_length_params* params) {
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_thompson_draft_length_params& p = *params;
  const eesd_status status = eesd::check_params(p);
  if (status != EESD_OK || p.batch == 0) return status;
  if (p.rule == EESD_RULE_COST || p.rule == EESD_RULE_CALIBRATED) {
    eesd::plan_by_cost(p);
  } else {
    for (int64_t b = 0; b < p.batch; ++b) eesd::plan_row(p, b);
  }
  return EESD_OK;
}

eesd_status eesd_thompson_look_cpu(const eesd_thompson_look_params* params) {
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_thompson_look_params& p = *params;
  const eesd_status status = eesd::check_params(p);
  if (status != EESD_OK) return status;
  for (int64_t b = 0; b < p.batch; ++b) eesd::look_row(p, b);
  return EESD_OK;
}

eesd_status eesd_thompson_update_cpu(const eesd_thompson_update_params* params) {
  if (!params) return EESD_ERROR_NULL_POINTER;
  const eesd_thompson_update_params& p = *params;
  const eesd_status status = eesd::check_params(p);
  if (status != EESD_OK) return status;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t j = 0; j < p.buckets; ++j) eesd::update_element(p, b, j);
  }
  return EESD_OK;
}
