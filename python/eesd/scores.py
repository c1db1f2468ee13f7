"""What `output_scores` returns: processed logits after temperature and filters."""

from collections.abc import Sequence

import torch
from torch import Tensor

REMOVED = -torch.inf


def warped(scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """`[.., V]` over the temperature, -inf where a filter removes; ties at a threshold are kept.

    The kept ids are those of `eesd_kernels/reference/target_law.py`.
    """
    x = scores.double() / temperature
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(top_k).values[..., -1:], REMOVED)
    if top_p < 1.0:
        p = x.softmax(-1)
        ranked = p.sort(dim=-1, descending=True).values
        before = ranked.cumsum(-1).roll(1, -1)
        before[..., 0] = 0.0
        needed = (before < top_p).sum(-1, keepdim=True)
        x = x.masked_fill(p < ranked.gather(-1, needed - 1), REMOVED)
    if min_p > 0.0:
        p = x.softmax(-1)
        x = x.masked_fill(p < min_p * p.amax(-1, keepdim=True), REMOVED)
    return x.float()


def by_step(
    sequences: Sequence[list[Tensor] | None], steps: int, vocab: int
) -> tuple[Tensor, ...] | None:
    """Rows `[1, V]` a token of each sequence as one `[B, V]` a step; -inf behind a text's end."""
    known = [rows for rows in sequences if rows is not None]
    if not known:
        return None
    device = next((rows[0].device for rows in known if rows), None)
    ended = torch.full((1, vocab), REMOVED, device=device)
    return tuple(
        torch.cat([rows[step] if step < len(rows) else ended for rows in known])
        for step in range(steps)
    )
