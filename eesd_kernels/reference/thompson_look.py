"""The calibrated rule: how sure the exit is of its next token says whether to draft it.

Row b holds a posterior for each bucket j of the exit's top probability, which is read before the
draw. theta_j is drawn once a round and bucket, and theta from the marginal posterior (all buckets
pooled). With `P_i` the product of the included tokens' theta_j and `E = 1 + sum_{h<i} P_h`:

- before exit step i: look iff some l >= i has
  `(E + P_(i-1) (theta + .. + theta^(l-i+1))) / C(l) > E / C(i-1)`;
- after it, the look being paid for: include token i iff
  `P_i (C(i-1) + c_exit) > E (C(i) - C(i-1) - c_exit)`.

A row that does not look, or does not include, drafts no further. Each row decides for itself, with
the costs of the batch's round, and pays for itself where it has a credit (in plain steps): 1 at
step 0, `c_exit / C(0)` for a look, the rest of `(C(i) - C(i-1)) / C(0)` for an included token. It
looks only at tokens that it can pay, the round's one certain token counted:
`C(l) - C(i-1) <= (credit + 1) C(0)`. A row whose credit is not finite drafts nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eesd_kernels.reference.sample_beta import sample_beta
from eesd_kernels.reference.thompson_draft_length import with_pooled


def thompson_look(
    alpha: Tensor,
    beta: Tensor,
    cap: Tensor,
    costs: Tensor,
    exit_cost: float,
    seed: Tensor,
    position: Tensor,
    step: int,
    top_prob: Tensor,
    length: Tensor,
    bucket: Tensor,
    run: Tensor,
    looking: Tensor,
    credit: Tensor | None = None,
    draw: Callable[..., Tensor] = sample_beta,
) -> None:
    cost, buckets = costs.double(), alpha.shape[1]
    cap = cap.clamp(max=len(costs) - 1)
    left = torch.zeros_like(run[:, 0]) if credit is None else credit.clone()
    theta = draw(with_pooled(alpha), with_pooled(beta), seed, position).nan_to_num(-1.0)
    if step == 0:
        length.zero_()
        bucket.fill_(-1)
        run[:, :2] = 1.0
        run[:, 2] = theta[:, -1]
        going = torch.ones_like(cap, dtype=torch.bool)
        left[cap >= 0] -= 1
    else:
        known = top_prob >= 0
        j = (top_prob.nan_to_num(0.0).clamp(0, 1) * buckets).long().clamp(max=buckets - 1)
        chance = theta.gather(1, j[:, None])[:, 0].double()
        reach, expected = run[:, 0].double() * chance, run[:, 1].double()
        pays = reach * (cost[step - 1] + exit_cost) > expected * (
            cost[step] - cost[step - 1] - exit_cost
        )
        going = (looking != 0) & known & (chance >= 0) & (step <= cap) & pays
        length[going] = step
        bucket[going, step - 1] = j[going].to(torch.int32)
        run[going, 0] = reach[going].float()
        run[going, 1] = (expected + reach)[going].float()
        token = (cost[step] - cost[step - 1] - exit_cost) / cost[0]
        left[going] = (left.double() - token)[going].float()
    power, total, marginal = run[:, 0].double(), run[:, 1].double(), run[:, 2].double()
    expected, worth, paid = total, torch.zeros_like(going), left.isfinite()
    limit = (left.double() + 1) * cost[0]
    for longer in range(step + 1, len(costs)):
        if credit is not None:
            paid = paid & (cost[longer] - cost[step] <= limit)
        power = power * marginal
        total = total + power
        worth |= paid & (longer <= cap) & (total * cost[step] > expected * cost[longer])
    looking.copy_(going & worth & (marginal >= 0))
    if credit is not None:
        look = (left.double() - exit_cost / cost[0]).float()
        credit.copy_(torch.where(looking != 0, look, left))
