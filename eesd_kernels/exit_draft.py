"""`exit_topk` and `sample_draft` in one: from a hidden state to drafted tokens and their law.

On CUDA the draw stands behind the merge of the candidates, in its launch, so that a draft step
costs none of its own. The results are those of the two ops in turn, and the draft's top
probability is `exp(values[:, 0] - logsumexp)`.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import Checks
from eesd_kernels._cpu import sample_draft_cpu
from eesd_kernels._library import register, triton_op
from eesd_kernels.exit_topk import check_exit_topk, exit_topk_op
from eesd_kernels.sample_draft import check_draw

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _cpu(
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
) -> Results:
    values, ids, lse = exit_topk_op(hidden, lm_head, k, norm_weight, eps)
    drawn = sample_draft_cpu(values, ids, temperature, law, n, seed, position, base, parent)
    return values, ids, lse, *drawn


def _fake(
    hidden: Tensor,
    lm_head: Tensor,
    k: int,
    norm_weight: Tensor | None,
    eps: float,
    temperature: Tensor,
    law: Tensor,
    n: int,
    *_: Tensor | None,
) -> Results:
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows, k, dtype=torch.float32),
        hidden.new_empty(rows, k, dtype=torch.int32),
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty(rows, n, dtype=torch.int32),
        hidden.new_empty(rows, k, dtype=torch.float32),
    )


exit_draft_op = register(
    "exit_draft(Tensor hidden, Tensor lm_head, int k, Tensor? norm_weight, float eps,"
    " Tensor temperature, Tensor law, int n, Tensor seed, Tensor position, Tensor base,"
    " Tensor? parent) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.exit_draft,
    cpu=_cpu,
    cuda=triton_op("exit_draft", reference.exit_draft),
    fake=_fake,
)


def exit_draft(
    hidden: Tensor,
    lm_head: Tensor,
    k: int,
    temperature: Tensor,
    law: Tensor,
    n: int,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    parent: Tensor | None = None,
    out: Results | None = None,
) -> Results:
    """The k best early-exit logits of each row, and n child tokens drawn from them.

    Args:
        hidden, lm_head, k, norm_weight, eps: as of `exit_topk`.
        temperature, law, n, seed, position, base, parent: as of `sample_draft`.
        out: the five results, contiguous: written and returned, nothing is allocated but scratch.

    Returns:
        values float32 `[R, k]`, ids int32 `[R, k]`, logsumexp float32 `[R]`, as of `exit_topk`;
        child ids int32 `[R, n]`, q float32 `[R, k]`, as of `sample_draft`. A bad row: NaN, -1,
        NaN, -1, 0.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("exit_draft")
    check_exit_topk(check, hidden, lm_head, k, norm_weight, eps)
    check_draw(check, k, temperature, law, n, seed, position, base, parent)
    arguments = (
        hidden, lm_head, k, norm_weight, eps, temperature, law, n, seed, position, base, parent,
    )  # fmt: skip
    if out is None:
        return exit_draft_op(*arguments)
    floats, ints = (("R", k), torch.float32), (("R", k), torch.int32)
    forms = (floats, ints, (("R",), torch.float32), (("R", n), torch.int32), floats)
    torch.ops.eesd.exit_draft.out(*arguments, **check.outputs(out, forms))
    return out
