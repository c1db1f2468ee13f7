"""`silu(gate) * up` of the two halves of the last dimension."""

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    inner = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(inner).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
