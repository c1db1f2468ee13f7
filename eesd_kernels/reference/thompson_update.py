"""Fold a round's outcome into the posterior, in place.

With m accepted of l drafted, the trials after the first rejection are unobserved:
`alpha = a0 + g (alpha - a0) + m`, `beta = b0 + g (beta - b0) + [m < l]`. Rows with a negative l
took no part in the round and stay as they are.
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
) -> None:
    live = drafted >= 0
    new_alpha = prior_alpha + discount * (alpha - prior_alpha) + accepted
    new_beta = prior_beta + discount * (beta - prior_beta) + (accepted < drafted)
    alpha.copy_(torch.where(live, new_alpha, alpha))
    beta.copy_(torch.where(live, new_beta, beta))
