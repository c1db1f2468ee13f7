"""`y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019).

x `[..., H]`; float32 (float64 for float64) inside; reads x and writes y once. Each row is reduced
on its own, so it is row-invariant. It takes no residual: `linear` adds that to its product, and
may do this norm too.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import rms_norm_cpu
from eesd_kernels._library import register, triton_op


def _cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = rms_norm_cpu(x, weight, eps)
    return reference.rms_norm(x, weight, eps) if out is None else out


rms_norm_op = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference.rms_norm,
    cpu=_cpu,
    cuda=triton_op("rms_norm", reference.rms_norm),
    fake=lambda x, weight, eps: x.new_empty(x.shape),
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, out: Tensor | None = None) -> Tensor:
    """Normalise rows by their root mean square.

    Args:
        x: `[R, H]` floating. weight: `[H]` floating. eps: 0 to 1.
        out: as x, contiguous: written and returned, nothing is allocated. It may be x.

    Returns:
        `[R, H]`, the dtype of x.
    """
    check = Checks("rms_norm")
    check.tensor("x", x, ("R", "H"), FLOATING)
    check.tensor("weight", weight, ("H",), FLOATING)
    check.number("eps", eps, 0.0, 1.0)
    if out is None:
        return rms_norm_op(x, weight, eps)
    check.tensor("out", out, ("R", "H"), x.dtype, contiguous=True)
    torch.ops.eesd.rms_norm.out(x, weight, eps, out0=out)
    return out
