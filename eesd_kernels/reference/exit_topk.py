"""Early-exit logits, their `k` best and their normaliser.

`logits = rms_norm(hidden) W^T`; the k largest in descending order, ties to the lower id, and
`logsumexp(logits)`. A row with NaN or +inf, or without a finite logit: ids -1, values NaN.
"""

import torch
from torch import Tensor

from eesd_kernels.reference.linear import linear
from eesd_kernels.reference.rms_norm import rms_norm


def topk_lower_id(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` with its ties settled: the lower id first, also at the k-th place."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids[..., :k]


def exit_topk(
    hidden: Tensor, lm_head: Tensor, k: int, norm_weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    inner = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden if norm_weight is None else rms_norm(hidden, norm_weight, eps)
    logits = linear(x.to(inner), lm_head)
    values, ids = topk_lower_id(logits, k)
    lse = logits.logsumexp(-1)
    bad = ~lse.isfinite()
    return (
        values.float().masked_fill(bad[:, None], torch.nan),
        ids.to(torch.int32).masked_fill(bad[:, None], -1),
        lse.float().masked_fill(bad, torch.nan),
    )
