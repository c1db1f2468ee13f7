"""Draw draft tokens from a sparse exit law: one, or n children without replacement.

`q = softmax(values / temperature)` over the k candidates of `exit_topk`; the draw is a race keyed
by (seed, position, round base, candidate id), so it repeats anywhere, token for token. The law
that produced the children is an argument and must be given to verification unchanged. Moves
O(k) numbers a row. It draws; it prunes and re-orders nothing, since that would bias the text.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import Checks
from eesd_kernels._cpu import sample_draft_cpu
from eesd_kernels._library import register, triton_op
from eesd_kernels.exit_topk import MAX_K


def _fake(
    values: Tensor,
    ids: Tensor,
    temperature: Tensor,
    law: Tensor,
    n: int,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    parent: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return ids.new_empty(values.shape[0], n), values.new_empty(values.shape)


sample_draft_op = register(
    "sample_draft(Tensor values, Tensor ids, Tensor temperature, Tensor law, int n, Tensor seed,"
    " Tensor position, Tensor base, Tensor? parent) -> (Tensor, Tensor)",
    reference=reference.sample_draft,
    cpu=sample_draft_cpu,
    cuda=triton_op("sample_draft", reference.sample_draft),
    fake=_fake,
)


def check_draw(
    check: Checks,
    k: int,
    temperature: Tensor,
    law: Tensor,
    n: int,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    parent: Tensor | None,
) -> None:
    """The arguments that `sample_draft` and `exit_draft` share."""
    check.tensor("temperature", temperature, ("R",), torch.float32)
    check.tensor("law", law, ("R",), torch.int32)
    check.integer("n", n, 1, k)
    check.tensor("seed", seed, ("R",), torch.int64)
    check.tensor("position", position, ("R",), torch.int32)
    check.tensor("base", base, ("R",), torch.int32)
    if parent is not None:
        check.tensor("parent", parent, ("R",), torch.int32)


def sample_draft(
    values: Tensor,
    ids: Tensor,
    temperature: Tensor,
    law: Tensor,
    n: int,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    *,
    parent: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw n child tokens a row.

    Args:
        values: `[R, k]` float32, exit logits, k at most 64. ids: `[R, k]` int32, -1: none.
        temperature: `[R]` float32; 0 takes the n best.
        law: `[R]` int32, see `Law`.
        n: children a row, 1 to k.
        seed: `[R]` int64. position, base: `[R]` int32, place of the drawn token and round base.
        parent: `[R]` int32, node of the tree whose children these are; None: a linear draft.
        out: the two results, contiguous: written and returned, nothing is allocated.

    Returns:
        child ids int32 `[R, n]` in the order drawn, -1 where the row has no more candidates;
        q float32 `[R, k]`, the very probabilities that verification needs.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("sample_draft")
    check.tensor("values", values, ("R", "k"), torch.float32)
    check.integer("k", values.shape[1], 1, MAX_K)
    check.tensor("ids", ids, ("R", "k"), torch.int32)
    check_draw(check, values.shape[1], temperature, law, n, seed, position, base, parent)
    arguments = (values, ids, temperature, law, n, seed, position, base, parent)
    if out is None:
        return sample_draft_op(*arguments)
    forms = ((("R", n), torch.int32), (("R", "k"), torch.float32))
    torch.ops.eesd.sample_draft.out(*arguments, **check.outputs(out, forms))
    return out
