"""`exit_topk`, then `sample_draft` from what it gave."""

from collections.abc import Callable

from torch import Tensor

from eesd_kernels.reference.exit_topk import exit_topk
from eesd_kernels.reference.philox import philox_words
from eesd_kernels.reference.sample_draft import sample_draft


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
    parent: Tensor | None = None,
    words: Callable[..., Tensor] = philox_words,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values, ids, lse = exit_topk(hidden, lm_head, k, norm_weight, eps)
    children, q = sample_draft(
        values, ids, temperature, law, n, seed, position, base, parent, words
    )
    return values, ids, lse, children, q
