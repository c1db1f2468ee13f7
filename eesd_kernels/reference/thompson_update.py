"""Fold a round's outcome into the posterior, in place.

With m accepted of l drafted, the trials after the first rejection are unobserved:
`alpha = a0 + g (alpha - a0) + m`, `beta = b0 + g (beta - b0) + [m < l]`. With a posterior a
bucket, each of the tokens 1..m succeeds in its own bucket and token m + 1 fails in its. Rows with
a negative l took no part in the round and stay as they are. The `m + 1` tokens of the round add
`token_credit` each to the row's credit, to `credit_limit` at most.
"""

import torch
from torch import Tensor


def thompson_update(
    alpha: Tensor,
    beta: Tensor,
    prior_alpha: Tensor,
    prior_beta: Tensor,
    drafted: Tensor,
    accepted: Tensor,
    discount: float,
    bucket: Tensor | None = None,
    credit: Tensor | None = None,
    token_credit: float = 1.0,
    credit_limit: float = float("inf"),
) -> None:
    live, successes, failures = drafted >= 0, accepted, accepted < drafted
    if credit is not None:
        brought = credit.double() + (accepted.double() + 1) * token_credit
        brought[brought > credit_limit] = credit_limit
        credit.copy_(torch.where(live, brought, credit.double()))
    if bucket is not None:
        token = torch.arange(bucket.shape[1], device=bucket.device)
        own = bucket[:, :, None] == torch.arange(alpha.shape[1], device=bucket.device)
        successes = (own & (token < accepted[:, None])[..., None]).sum(1)
        failures = (own & ((token == accepted[:, None]) & failures[:, None])[..., None]).sum(1)
        live = live[:, None]
    new_alpha = prior_alpha + discount * (alpha - prior_alpha) + successes
    new_beta = prior_beta + discount * (beta - prior_beta) + failures
    alpha.copy_(torch.where(live, new_alpha, alpha))
    beta.copy_(torch.where(live, new_beta, beta))
