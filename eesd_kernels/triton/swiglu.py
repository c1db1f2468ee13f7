"""`silu(gate) * up`, `[R, 2 I]` to `[R, I]`: one program a row and block of columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    gate = tl.load(gate_up_ptr + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + size + cols, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * size + cols, out, mask=mask)


def swiglu(gate_up: Tensor, *, out: tuple[Tensor, ...] | None = None) -> Tensor | None:
    if gate_up.dtype is torch.float64:
        return None
    size = gate_up.shape[-1] // 2
    y = out[0] if out else gate_up.new_empty(*gate_up.shape[:-1], size)
    x = gate_up.contiguous().view(-1, 2 * size)
    if y.numel():
        grid = (x.shape[0], triton.cdiv(size, BLOCK))
        _swiglu_kernel[grid](x, y, x.stride(0), size, BLOCK=BLOCK, num_warps=4)
    return y
