"""`silu(gate) * up` over a fused `[..., 2 I]` gate-up product (Shazeer 2020).

Elementwise, float32 inside (float64 for float64); reads 2 I and writes I numbers a row.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import swiglu_cpu
from eesd_kernels._library import register, triton_op


def _cpu(gate_up: Tensor) -> Tensor:
    out = swiglu_cpu(gate_up)
    return reference.swiglu(gate_up) if out is None else out


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


swiglu_op = register(
    "swiglu(Tensor gate_up) -> Tensor",
    reference=reference.swiglu,
    cpu=_cpu,
    cuda=triton_op("swiglu", reference.swiglu),
    fake=_fake,
)


def swiglu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Gate the second half of each row by the SiLU of the first.

    Args:
        gate_up: `[R, 2 I]` floating.
        out: `[R, I]`, the same dtype, contiguous: written and returned, nothing is allocated.

    Returns:
        `[R, I]`, the same dtype.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device.
    """
    check = Checks("swiglu")
    check.tensor("gate_up", gate_up, ("R", "2I"), FLOATING)
    if gate_up.shape[1] % 2:
        raise ValueError(f"swiglu: gate_up: expected an even row, got {gate_up.shape[1]}")
    if out is None:
        return swiglu_op(gate_up)
    check.tensor("out", out, ("R", gate_up.shape[1] // 2), gate_up.dtype, contiguous=True)
    torch.ops.eesd.swiglu.out(gate_up, out0=out)
    return out
