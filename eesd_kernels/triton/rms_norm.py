"""`y = x / sqrt(mean(x^2) + eps) * weight`, `[R, H]`: one program a row, which it reads once.

A row of more than `BLOCK` numbers is read twice, the second time from the cache. There is no form
with a residual: `linear` adds the residual to its product, and what it writes is normalised here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.launch import overlap

BLOCK = 16_384


@triton.jit
def norm_row(x_ptr, weight_ptr, out_ptr, size, eps, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """One row, at `x_ptr`, to `out_ptr`."""
    at = tl.arange(0, BLOCK)
    if WHOLE:  # [BLOCK], in registers throughout
        inside = at < size
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
        tl.store(out_ptr + at, x * rstd * weight, mask=inside)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, size, BLOCK):
            cols = first + at
            x = tl.load(x_ptr + cols, mask=cols < size, other=0.0).to(tl.float32)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, 0) / size + eps)
        for first in range(0, size, BLOCK):
            cols = first + at
            inside = cols < size
            weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + cols, x * rstd * weight, mask=inside)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, stride, size, eps, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    norm_row(x_ptr + row * stride, weight_ptr, out_ptr + row * size, size, eps, WHOLE, BLOCK)


def tile_of(size: int) -> tuple[int, int]:
    """Numbers of a row held at once, and the warps for them."""
    block = min(BLOCK, triton.next_power_of_2(size))
    return block, max(1, min(16, block // 512))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, out: tuple[Tensor, ...] | None = None
) -> Tensor | None:
    if torch.float64 in (x.dtype, weight.dtype) or not x.shape[-1]:
        return None
    size = x.shape[-1]
    y = out[0] if out else x.new_empty(x.shape)
    rows = x.reshape(-1, size)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if y.numel():
        block, warps = tile_of(size)
        _rms_norm_kernel[(rows.shape[0],)](
            rows, weight.contiguous(), y, rows.stride(0), size, eps,
            WHOLE=size <= block, BLOCK=block, num_warps=warps, **overlap(x),
        )  # fmt: skip
    return y
