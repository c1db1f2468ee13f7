"""`y = x W^T (+ residual)`; float32 (or wider) accumulation."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    out = torch.nn.functional.linear(x, weight.to(x.dtype))
    return out if residual is None else out + residual
