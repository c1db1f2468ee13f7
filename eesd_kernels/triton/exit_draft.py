"""`exit_topk` with the draw in its second launch, on the candidates where they are."""

import torch
from torch import Tensor

from eesd_kernels.triton.exit_topk import launch, new_outputs


def exit_draft(
    hidden: Tensor,
    lm_head: Tensor,
    k: int,
    norm_weight: Tensor | None,
    eps: float,
    temperature: Tensor,
    law: Tensor,
    n: int,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    parent: Tensor | None,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...] | None:
    if out is None:
        values, ids, lse = new_outputs(hidden, k)
        child = torch.empty(hidden.shape[0], n, dtype=torch.int32, device=hidden.device)
        out = values, ids, lse, child, torch.empty_like(values)
    given = (temperature, law, seed, position, base, parent)
    draft = tuple(None if x is None else x.contiguous() for x in given)
    return out if launch(hidden, lm_head, k, norm_weight, eps, out, draft, n) else None
