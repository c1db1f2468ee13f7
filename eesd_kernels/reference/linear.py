"""`y = n(x) W^T (+ residual)`: the product, and what may be fused before and after it.

The plain composition of `rms_norm`, the product and `swiglu`, each with float32 (or wider) sums and
a result of x's dtype; float64 tensors make it the specification.
"""

import torch
from torch import Tensor

from eesd_kernels.reference.rms_norm import rms_norm
from eesd_kernels.reference.swiglu import swiglu as gate


def linear(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    swiglu: bool = False,
) -> Tensor:
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    out = torch.nn.functional.linear(x, weight.to(x.dtype))
    if swiglu:
        out = gate(out)
    return out if residual is None else out + residual
