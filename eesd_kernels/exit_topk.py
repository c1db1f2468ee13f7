"""Early-exit logits reduced where they arise: the k best, their ids and the normaliser.

`logits = rms_norm(hidden) W^T`, hidden `[R, H]`, lm_head `[V, H]`; the k largest (descending,
ties to the lower id) and `logsumexp(logits)`. Bound by reading the weight, `V H` numbers. The
full `[R, V]` row leaves the op nowhere, and no dense draft distribution exists anywhere. On CUDA
one pass over the weight serves up to 64 rows, and a row has the same bits in any batch.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import exit_topk_cpu
from eesd_kernels._library import register, triton_op

MAX_K = 64


def _cpu(
    hidden: Tensor, lm_head: Tensor, k: int, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = exit_topk_cpu(hidden, lm_head, k, norm_weight, eps)
    return reference.exit_topk(hidden, lm_head, k, norm_weight, eps) if out is None else out


def _fake(
    hidden: Tensor, lm_head: Tensor, k: int, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows, k, dtype=torch.float32),
        hidden.new_empty(rows, k, dtype=torch.int32),
        hidden.new_empty(rows, dtype=torch.float32),
    )


exit_topk_op = register(
    "exit_topk(Tensor hidden, Tensor lm_head, int k, Tensor? norm_weight, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.exit_topk,
    cpu=_cpu,
    cuda=triton_op("exit_topk", reference.exit_topk),
    fake=_fake,
)


def check_exit_topk(
    check: Checks, hidden: Tensor, lm_head: Tensor, k: int, norm_weight: Tensor | None, eps: float
) -> None:
    """The arguments that `exit_topk` and `exit_draft` share."""
    check.tensor("hidden", hidden, ("R", "H"), FLOATING)
    mixed = (torch.bfloat16,) if hidden.dtype is torch.float32 else ()
    check.tensor("lm_head", lm_head, ("V", "H"), (hidden.dtype, *mixed))
    if norm_weight is not None:
        check.tensor("norm_weight", norm_weight, ("H",), FLOATING)
    check.integer("k", k, 1, min(MAX_K, lm_head.shape[0]))
    check.number("eps", eps, 0.0, 1.0)


def exit_topk(
    hidden: Tensor,
    lm_head: Tensor,
    k: int,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best early-exit logits of each row.

    Args:
        hidden: `[R, H]` floating. lm_head: `[V, H]`, the dtype of hidden, or bfloat16 under
            float32 hidden.
        k: kept candidates, 1 to min(64, V).
        norm_weight: `[H]` weight of the RMSNorm before the head; None: no norm.
        eps: of that norm.
        out: the three results, contiguous: written and returned, nothing is allocated but scratch.

    Returns:
        values float32 `[R, k]` descending, ids int32 `[R, k]` (ties to the lower id),
        logsumexp float32 `[R]`. A row with NaN or +inf logits, or none finite: NaN, -1, NaN.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("exit_topk")
    check_exit_topk(check, hidden, lm_head, k, norm_weight, eps)
    arguments = (hidden, lm_head, k, norm_weight, eps)
    if out is None:
        return exit_topk_op(*arguments)
    forms = ((("R", k), torch.float32), (("R", k), torch.int32), (("R",), torch.float32))
    torch.ops.eesd.exit_topk.out(*arguments, **check.outputs(out, forms))
    return out
