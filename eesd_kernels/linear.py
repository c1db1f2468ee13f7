"""`y = n(x) W^T (+ residual)`, x `[R, H]`, weight `[O, H]`: the product of decode and verification.

Row-invariant: the weight is the left operand of a loop over H whose tiles depend on the weight's
shape alone. On CUDA in bf16, fp16 and fp32 with float32 sums; on the CPU for float32 activations
over float32 or bfloat16 weights (upcast exactly, so half the bytes give the same bits). Moves the
weight once for every 64 rows (CPU: eight), and that is what bounds it.

Fused on CUDA, so that they cost no pass of their own: the residual and SwiGLU after it, one
rounding in all; an RMSNorm before it in bf16, as `rstd * (W (g x))` with `g x` rounded. The CPU
does them one by one, with the bits of the ops `rms_norm`, `linear` and `swiglu`. No bias, no
transposed weight.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import linear_cpu
from eesd_kernels._library import register, triton_op
from eesd_kernels.rms_norm import rms_norm_op
from eesd_kernels.swiglu import swiglu_op


def _cpu(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    swiglu: bool = False,
) -> Tensor:
    if norm_weight is not None:
        x = rms_norm_op(x, norm_weight, eps)
    added = None if swiglu else residual
    out = linear_cpu(x, weight, added)
    if out is None:
        out = reference.linear(x, weight, added)
    if not swiglu:
        return out
    out = swiglu_op(out)
    return out if residual is None else out + residual


def _fake(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    swiglu: bool = False,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if swiglu else 1))


linear_op = register(
    "linear(Tensor x, Tensor weight, Tensor? residual, Tensor? norm_weight=None, "
    "float eps=1e-5, bool swiglu=False) -> Tensor",
    reference=reference.linear,
    cpu=_cpu,
    cuda=triton_op("linear", reference.linear),
    fake=_fake,
)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    swiglu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply rows by a weight.

    Args:
        x: `[R, H]` bf16, fp16, fp32 or fp64.
        weight: `[O, H]`, the dtype of x, or bfloat16 under float32 x.
        residual: as the result, added to it.
        norm_weight: `[H]` floating: x is normalised by its root mean square first.
        eps: of that norm, 0 to 1.
        swiglu: the weight is a gate's over an up's, `[2 I, H]`: the result is
            `silu(gate) * up`, `[R, I]`.
        out: as the result, contiguous: written and returned, nothing is allocated (but for a
            norm before fp16 and fp32). It may be the residual, not x.

    Returns:
        `[R, O]` (swiglu: `[R, I]`), the dtype of x.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device.
    """
    check = Checks("linear")
    check.tensor("x", x, ("R", "H"), FLOATING)
    mixed = (torch.bfloat16,) if x.dtype is torch.float32 else ()
    check.tensor("weight", weight, ("O", "H"), (x.dtype, *mixed))
    outs: str | int = "O"
    if swiglu:
        if weight.shape[0] % 2:
            raise ValueError(f"linear: weight: expected 2 I rows, got {weight.shape[0]}")
        outs = weight.shape[0] // 2
    if residual is not None:
        check.tensor("residual", residual, ("R", outs), x.dtype)
    if norm_weight is not None:
        check.tensor("norm_weight", norm_weight, ("H",), FLOATING)
        check.number("eps", eps, 0.0, 1.0)
    if out is None:
        return linear_op(x, weight, residual, norm_weight, eps, swiglu)
    check.tensor("out", out, ("R", outs), x.dtype, contiguous=True)
    torch.ops.eesd.linear.out(x, weight, residual, norm_weight, eps, swiglu, out0=out)
    return out
