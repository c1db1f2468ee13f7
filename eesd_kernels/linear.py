"""`y = x W^T (+ residual)`, x `[R, H]`, weight `[O, H]`: the product of decode and verification.

Row-invariant where it is not the plain reference: on the CPU for float32 activations over float32
or bfloat16 weights (upcast exactly, so half the bytes give the same bits). Moves the weight once
for every eight rows, and that is what bounds it. It does not transpose and has no bias.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import linear_cpu
from eesd_kernels._library import register


def _cpu(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    out = linear_cpu(x, weight, residual)
    return reference.linear(x, weight, residual) if out is None else out


def _fake(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


linear_op = register(
    "linear(Tensor x, Tensor weight, Tensor? residual) -> Tensor",
    reference=reference.linear,
    cpu=_cpu,
    fake=_fake,
)


def linear(x: Tensor, weight: Tensor, *, residual: Tensor | None = None) -> Tensor:
    """Multiply rows by a weight.

    Args:
        x: `[R, H]` bf16, fp16, fp32 or fp64.
        weight: `[O, H]`, the dtype of x, or bfloat16 under float32 x.
        residual: `[R, O]`, the dtype of x, added to the product.

    Returns:
        `[R, O]`, the dtype of x.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device.
    """
    check = Checks("linear")
    check.tensor("x", x, ("R", "H"), FLOATING)
    mixed = (torch.bfloat16,) if x.dtype is torch.float32 else ()
    check.tensor("weight", weight, ("O", "H"), (x.dtype, *mixed))
    if residual is not None:
        check.tensor("residual", residual, ("R", "O"), x.dtype)
    return linear_op(x, weight, residual)
