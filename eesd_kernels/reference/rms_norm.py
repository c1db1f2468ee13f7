"""`y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension, float32 or float64 inside."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    inner = torch.promote_types(x.dtype, torch.float32)
    h = x.to(inner)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * weight.to(inner)).to(x.dtype)
