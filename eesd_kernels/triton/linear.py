"""`y = x W^T` with the weight as the left operand: `acc[O, rows] += W[O, H] x[H, rows]`.

The configuration depends on the weight's shape alone and H is summed in ascending order, so that a
row has the same bits in any batch; only the width of the row tile follows the number of rows, and
the columns of a tensor core product do not see each other. The weight is read once for up to 64
rows, and that read is what bounds it; row tiles beyond are neighbours in the grid and meet it in
the L2.

Fused: the residual (added to the float32 sum) and SwiGLU (eight rows of the gate's weight, eight of
the up's, so that both of an output meet in one thread). An RMSNorm is a launch before: taken into
the loop it was no quicker on an H200, nor were tiles dealt in equal runs to a fixed number of
programs.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.launch import architecture, overlap, shared_memory
from eesd_kernels.triton.rms_norm import rms_norm

ROW_TILES = (16, 32, 64)
GROUP = tl.constexpr(8)  # a thread of m16n8k16 and of wgmma holds rows r and r + 8


class Config(NamedTuple):
    """How one weight shape is tiled."""

    block_o: int
    block_h: int
    warps: int
    stages: int


HALVES = Config(64, 128, 4, 6)
"""The best on an H200 for the shapes of 13B and 70B together; `BY_SHAPE` has those that have a
better one."""
BY_SHAPE = {
    (15_360, 5_120): Config(128, 64, 4, 6),
    (27_648, 5_120): Config(128, 64, 4, 4),
    (10_240, 8_192): Config(128, 128, 8, 4),
    (57_344, 8_192): Config(128, 128, 8, 4),
    (8_192, 8_192): Config(64, 128, 4, 5),
    (8_192, 28_672): Config(64, 128, 4, 5),
}
OTHERS = Config(32, 32, 4, 3)  # float32, whose products are exact and not of tensor cores; odd rows


@triton.jit
def _weight_rows(tile, outs, SWIGLU: tl.constexpr, BLOCK_O: tl.constexpr):
    """The rows of the weight in a tile, and the outputs, `outs` in all, that they serve."""
    at = tl.arange(0, BLOCK_O)
    if SWIGLU:
        out = tile * (BLOCK_O // 2) + at // (2 * GROUP) * GROUP + at % GROUP
        return (out + at // GROUP % 2 * outs).to(tl.int64), out
    out = tile * BLOCK_O + at
    return out.to(tl.int64), out


@triton.jit
def product(
    x_ptrs, w_ptrs, in_rows, in_outs, H, DOT: tl.constexpr, EVEN_O: tl.constexpr,
    EVEN_H: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr,
    X_LEFT: tl.constexpr = False,
):  # fmt: skip
    """`acc[BLOCK_O, ROWS]`, float32, of the rows of the weight and of x at these pointers.

    With x as the left operand the bits are the same, and a thread holds more outputs of fewer rows.
    """
    if X_LEFT:
        acc = tl.zeros([ROWS, BLOCK_O], tl.float32)
    else:
        acc = tl.zeros([BLOCK_O, ROWS], tl.float32)
    for k in range(0, tl.cdiv(H, BLOCK_H)):
        at = k * BLOCK_H + tl.arange(0, BLOCK_H)
        # w [BLOCK_O, BLOCK_H], x [BLOCK_H, ROWS]
        if EVEN_H:
            x = tl.load(x_ptrs + at[:, None], mask=in_rows[None, :], other=0.0)
        else:
            x = tl.load(x_ptrs + at[:, None], mask=in_rows[None, :] & (at < H)[:, None], other=0.0)
        if EVEN_H and EVEN_O:
            w = tl.load(w_ptrs + at[None, :], eviction_policy="evict_first")
        else:
            inside = in_outs[:, None] & (at < H)[None, :]
            w = tl.load(w_ptrs + at[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        if X_LEFT:
            acc = tl.dot(x.to(DOT).trans(), w.to(DOT).trans(), acc, input_precision="ieee")
        else:
            acc = tl.dot(w.to(DOT), x.to(DOT), acc, input_precision="ieee")
    if X_LEFT:
        acc = acc.trans()
    return acc


@triton.jit(do_not_specialize=["R", "stride_r"])
def _linear_kernel(
    x_ptr, w_ptr, residual_ptr, out_ptr, R, outs, H, stride_x, stride_w, stride_r,
    DOT: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, EVEN_O: tl.constexpr,
    EVEN_H: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile of the weight and of the rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    in_rows = row < R
    w_row, served = _weight_rows(tile, outs, SWIGLU, BLOCK_O)
    in_outs = served < outs
    x_ptrs = x_ptr + row.to(tl.int64)[None, :] * stride_x
    w_ptrs = w_ptr + w_row[:, None] * stride_w
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = product(x_ptrs, w_ptrs, in_rows, in_outs, H, DOT, EVEN_O, EVEN_H, BLOCK_O, BLOCK_H, ROWS)
    if PDL:  # no sooner: programs that wait would take the place of those that read
        tl.extra.cuda.gdc_launch_dependents()

    PER_TILE: tl.constexpr = BLOCK_O // 2 if SWIGLU else BLOCK_O
    if SWIGLU:
        pairs = acc.reshape([BLOCK_O // (2 * GROUP), 2, GROUP, ROWS]).permute(0, 2, 3, 1)
        gate, up = pairs.split()
        acc = (gate / (1.0 + tl.exp(-gate)) * up).reshape([PER_TILE, ROWS])
    out = tile * PER_TILE + tl.arange(0, PER_TILE)
    inside = (out < outs)[:, None] & in_rows[None, :]
    if RESIDUAL:
        at = row.to(tl.int64)[None, :] * stride_r + out[:, None]
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64)[None, :] * outs + out[:, None], acc, mask=inside)


@lru_cache(maxsize=1024)
def config_of(rows: int, columns: int, halves: bool, aligned: bool) -> Config:
    """The configuration of a weight `[rows, columns]`; nothing of x decides it."""
    return BY_SHAPE.get((rows, columns), HALVES) if halves and aligned else OTHERS


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def linear(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    swiglu: bool = False,
    *,
    out: tuple[Tensor, ...] | None = None,
    config: Config | None = None,
    row_tile: int | None = None,
) -> Tensor | None:
    """`config` and `row_tile` are for measuring; left out, the shapes decide."""
    if x.dtype is torch.float64 or not x.shape[-1]:
        return None
    if norm_weight is not None:
        normed = rms_norm(x, norm_weight, eps)
        if normed is None:  # a weight in float64
            return None
        x = normed
    outs = weight.shape[0] // 2 if swiglu else weight.shape[0]
    y = out[0] if out else x.new_empty(*x.shape[:-1], outs)
    if not y.numel():
        return y
    weight, flat = _unit_stride(weight), _unit_stride(x.reshape(-1, x.shape[-1]))
    rows, columns = flat.shape
    if residual is not None:
        residual = _unit_stride(residual.reshape(rows, outs))
    size = weight.element_size()
    if config is None:
        steps = weight.data_ptr() | weight.stride(0) * size | columns * size
        config = config_of(*weight.shape, x.element_size() == 2, steps % 16 == 0)
    row_tile = row_tile or next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])
    per_tile = config.block_o // 2 if swiglu else config.block_o
    # The interpreter's product of bfloat16 is wrong; on a GPU float32 is for float32 alone.
    single = x.dtype is torch.float32 or x.device.type == "cpu"
    stage = config.block_h * (config.block_o * size + row_tile * x.element_size())
    arguments = (
        flat, weight, residual, y, rows, outs, columns, flat.stride(0), weight.stride(0),
        0 if residual is None else residual.stride(0),
    )  # fmt: skip
    constants = {
        "DOT": tl.float32 if single else tl.bfloat16 if x.dtype is torch.bfloat16 else tl.float16,
        "RESIDUAL": residual is not None,
        "SWIGLU": swiglu,
        "EVEN_O": outs % per_tile == 0,
        "EVEN_H": columns % config.block_h == 0,
        "BLOCK_O": config.block_o,
        "BLOCK_H": config.block_h,
        "ROWS": row_tile,
        "num_warps": config.warps,
        # Else ptxas spills a word on sm_100 to fit a program more, for which no memory is left.
        "maxnreg": 255 if architecture(x.device) >= 100 and not single else None,
        "num_stages": max(1, min(config.stages, (shared_memory(x.device) - 4096) // stage)),
        **overlap(x),
    }
    grid = triton.cdiv(rows, row_tile), triton.cdiv(outs, per_tile)
    _linear_kernel[grid](*arguments, **constants)
    return y
