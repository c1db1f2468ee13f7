"""The target's law after temperature, top-k, top-p and min-p, in that order.

- top-k keeps every logit at or above the k-th largest (0: off).
- top-p keeps the ids whose mass of strictly likelier ids is below `top_p` (1: off; 0: the
  likeliest). Ids of equal probability stand or fall together.
- min-p keeps the ids of at least `min_p` times the largest probability (0: off).

Ties at a threshold are kept, so the kept set is a function of the logits and not of a sort.
"""

import torch
from torch import Tensor


def target_law(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor | None:
    """Probabilities `[V]` float64 of one row of logits, or None for a bad row.

    Bad: NaN, +inf, or no finite logit. `temperature` is above 0.
    """
    x = logits.double()
    top = x.max()
    if not bool(top.isfinite()):
        return None
    x = (x - top) / temperature
    if 0 < top_k < x.numel():
        x = x.masked_fill(x < x.topk(top_k).values[-1], -torch.inf)
    p = x.softmax(-1)
    if top_p < 1.0:
        ranked = p.sort(descending=True).values
        before = ranked.cumsum(0).roll(1)
        before[0] = 0.0
        # The least likely id that is still needed; everything at or above it stays.
        needed = (before < top_p).sum().clamp(min=1)
        p = p.masked_fill(p < ranked[needed - 1], 0.0)
    if min_p > 0.0:
        p = p.masked_fill(p < min_p * p.max(), 0.0)
    return p / p.sum()
