"""Choose how many tokens to draft, from a Beta posterior over the chance of acceptance.

With theta drawn from the posterior (Thompson 1933), `E(l) = 1 + theta + .. + theta^l` tokens are
expected of a round of draft length l, which costs `C(l)`:

- cost: one L maximises `sum_b E_b(min(L, cap_b)) / C(L)`; row b drafts `min(L, cap_b)`.
- bernoulli: after each token theta is drawn afresh and drafting goes on with that probability
  (our reading of Liu et al. 2024).
- constant: the cap.
- calibrated: cost on the marginal posterior, all buckets of a row pooled.

A row with a posterior that is not positive and finite drafts nothing and has no part in L.

A credit (cost and calibrated) holds the plain steps that a row may still lose. The rows of a round
share it: of the lengths with `C(l) - C(0) <= mean C(0)` the best is L, and each row is left with
`mean - C(L) / C(0)`, to which `thompson_update` adds what the round's tokens bring. A row whose
credit is not finite drafts nothing and has no part in L or the mean.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eesd_kernels.laws import Purpose, Rule
from eesd_kernels.reference.philox import accept_uniform, philox_words
from eesd_kernels.reference.sample_beta import sample_beta


def with_pooled(posterior: Tensor) -> Tensor:
    """`[B, buckets]` and, in one column more, their sum: the marginal posterior."""
    pooled = posterior.double().sum(1, keepdim=True).float()
    return torch.cat((posterior, pooled), 1)


def sum_of_rows(x: Tensor) -> Tensor:
    """float64 `[B, n]` to `[n]` in the order of the kernels: 32 lanes, joined by a halving tree."""
    lanes = x.new_zeros(32, x.shape[1])
    for b, row in enumerate(x):
        lanes[b % 32] += row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def thompson_draft_length(
    alpha: Tensor,
    beta: Tensor,
    cap: Tensor,
    rule: int,
    costs: Tensor,
    seed: Tensor,
    position: Tensor,
    credit: Tensor | None = None,
    draw: Callable[..., Tensor] = sample_beta,
    words: Callable[..., Tensor] = philox_words,
) -> Tensor:
    live = cap >= 0
    cap = cap.clamp(0, costs.shape[0] - 1)
    longest = int(cap.max()) if cap.numel() else 0
    length = torch.arange(longest + 1, device=cap.device)
    if rule == Rule.CONSTANT or (longest == 0 and credit is None):
        return cap.to(torch.int32)
    if rule == Rule.BERNOULLI:
        steps = alpha.shape[0], longest
        theta = draw(alpha[:, None].expand(steps), beta[:, None].expand(steps), seed, position)
        coins = words(seed, position, torch.zeros_like(position), Purpose.PLAN, 4 * length[:-1])
        goes_on = accept_uniform(coins) < theta
        return torch.minimum(goes_on.cumprod(1).sum(1), cap).to(torch.int32)
    if rule == Rule.CALIBRATED:
        theta = draw(with_pooled(alpha), with_pooled(beta), seed, position)[:, -1].double()
    else:
        theta = draw(alpha, beta, seed, position).double()
    cost, members = costs.double(), live
    if credit is not None:
        members = live & credit.isfinite()
    live = members & theta.isfinite()
    powers = torch.ones(len(theta), longest + 1, dtype=torch.float64, device=cap.device)
    powers[:, 1:] = theta.nan_to_num()[:, None]
    expected = powers.cumprod(1).cumsum(1)  # E_b(l)
    expected = expected.gather(1, torch.minimum(length, cap[:, None]).long())
    gain = sum_of_rows(expected * live[:, None]) / cost[: longest + 1]
    if credit is not None:
        pool = sum_of_rows(torch.where(members, credit, 0).double()[:, None])
        dearer = (cost[: longest + 1] - cost[0]) * members.sum()
        gain[dearer > pool * cost[0]] = 0
        left = pool / members.sum() - cost[gain.argmax()] / cost[0]
        credit.copy_(torch.where(members, left, credit.double()))
    return (torch.minimum(cap, gain.argmax()) * live).to(torch.int32)
