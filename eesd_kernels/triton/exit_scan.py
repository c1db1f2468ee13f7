"""The scan of `exit_topk`: the product of a tile of the weight, and each of its groups' record.

A *record* is of one row and of `group` neighbouring ids, four words of 8 bytes: in their upper
halves the best logits, falling, one more than are listed (the last is the bound of all others), in
their lower halves the sum of exponentials below the best, then the place of each listed one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.keys import pack, zero_unless_finite
from eesd_kernels.triton.launch import architecture, overlap, shared_memory
from eesd_kernels.triton.linear import product

UNIT = tl.constexpr(float(1 << 23))  # at most 2^8 of them: a uint32 holds the sum of a group
WARP = tl.constexpr(16)  # rows of an accumulator in one warp, of mma and of wgmma


class Config(NamedTuple):
    """How a weight is read. `group` decides bits, and may follow V, H and k alone."""

    block_v: int
    block_h: int
    warps: int
    stages: int
    group: int = 64  # ids that share a list, a bound and a sum; divides block_v
    x_left: bool = False  # the operands' order; a warp then holds whole groups


HALVES = Config(64, 128, 4, 4)
MANY_ROWS = Config(64, 128, 4, 3, x_left=True)  # for a row tile of 64
"""Two programs an SM: one reads while the other lists. On an H200, merge behind scan, 32,000 x
4,096, 1 row: 68.0 us; with one program that reads as far ahead (6 stages) 70.5. 64 rows: 73.3 us;
with the weight on the left 81.6, for its groups lie across warps; at 16 rows that is the faster one
(wgmma). Tiles dealt to two programs an SM, in one loop over all their columns, were up to 3%
slower; so were all tiles at once, in four programs an SM, and tiles of 32 ids."""
SINGLES = Config(32, 32, 4, 3, 32)  # no tensor cores: float32 products are exact ones


def depth_of(log_k: int) -> int:
    """Listed logits of a group: k alone decides how often a group is computed anew."""
    return 2 if log_k <= 4 else 3


@triton.jit
def _whole(x):
    """A number in [0, 1] in units of 2^-23: the mantissa of 1 + x, an add where a cast is slow."""
    return (tl.minimum(x, 1.0) + 1.0).to(tl.uint32, bitcast=True) - 0x3F800000


@triton.jit
def _both(high, low):
    """An int64 of the upper half of one and the lower half of another."""
    return ((high >> 32 << 32) | (low & 0xFFFFFFFF)).to(tl.int64, bitcast=True)


@triton.jit
def _best_left(x, place, NONE: tl.constexpr):
    """The best of the ids that a warp holds, and x `[N, S, SPAN, ROWS]` without it."""
    top = tl.max(x, 2)
    first = tl.min(tl.where(x == top[:, :, None, :], place, NONE), 2)
    key = tl.where(top == top, pack(top, first), 0)
    return key, tl.where(place == first[:, :, None, :], float("nan"), x)


@triton.jit
def _most_left(x):
    """A key with the value of the best left."""
    top = tl.max(x, 2)
    return tl.where(top == top, pack(top, tl.zeros(top.shape, tl.int32)), 0)


@triton.jit
def _merge_twos(a1, a2, a3, sum_a, b1, b2, b3, sum_b):
    """Of two descending lists the head of their union: its r-th is the greatest a_r, b_r or
    min(a_i, b_j) with i + j = r."""
    c2 = tl.maximum(tl.maximum(a2, b2), tl.minimum(a1, b1))
    c3 = tl.maximum(tl.minimum(a1, b2), tl.minimum(a2, b1))
    return tl.maximum(a1, b1), c2, tl.maximum(tl.maximum(a3, b3), c3), sum_a + sum_b


@triton.jit
def _merge_threes(a1, a2, a3, a4, sum_a, b1, b2, b3, b4, sum_b):
    c1, c2, c3, total = _merge_twos(a1, a2, a3, sum_a, b1, b2, b3, sum_b)
    c4 = tl.maximum(tl.minimum(a1, b3), tl.maximum(tl.minimum(a2, b2), tl.minimum(a3, b1)))
    return c1, c2, c3, tl.maximum(tl.maximum(a4, b4), c4), total


@triton.jit
def _fetch(w_ptrs, COLUMNS: tl.constexpr):
    """The first columns of rows of the weight into the L2: a hint, which reads nothing."""
    WIDTH: tl.constexpr = w_ptrs.dtype.element_ty.primitive_bitwidth // 8
    lines = tl.arange(0, (COLUMNS * WIDTH + 127) // 128) * (128 // WIDTH)
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l",
        [(w_ptrs + lines[None, :]).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def _scan_kernel(
    x_ptr, w_ptr, lists_ptr, R, V, H, groups, stride_x, stride_w,
    DOT: tl.constexpr, EVEN_V: tl.constexpr, EVEN_H: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, DEPTH: tl.constexpr,
    X_LEFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile of the weight and of the rows."""
    tile = tl.program_id(1)
    N: tl.constexpr = BLOCK_V // GROUP
    SPAN: tl.constexpr = GROUP if X_LEFT else WARP  # ids of a group in one warp
    S: tl.constexpr = GROUP // SPAN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < R
    row = row.to(tl.int64)
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = ids < V
    w_ptrs = w_ptr + ids.to(tl.int64)[:, None] * stride_w
    if PDL:
        if EVEN_V and EVEN_H:  # no row or column beyond
            _fetch(w_ptrs, BLOCK_H)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = product(
        x_ptr + row[None, :] * stride_x, w_ptrs, in_rows, in_v, H, DOT, EVEN_V, EVEN_H, BLOCK_V,
        BLOCK_H, ROWS, X_LEFT,
    )  # fmt: skip

    # x [N, S, SPAN, ROWS]; NaN: not a logit, or no longer one
    x = tl.where(acc == acc, acc, float("inf"))
    if not EVEN_V:
        x = tl.where(in_v[:, None], x, float("nan"))
    x = x.reshape([N, S, SPAN, ROWS])
    place = tl.arange(0, GROUP).reshape([1, S, SPAN, 1])
    top = tl.max(tl.max(x, 2), 1)
    e = tl.exp(x - zero_unless_finite(top)[:, None, None, :])
    if not EVEN_V:
        e = tl.where(x == x, e, 0.0)
    total = tl.sum(_whole(e), 2)
    k1, x = _best_left(x, place, GROUP)
    k2, x = _best_left(x, place, GROUP)
    if DEPTH == 2:
        k3 = _most_left(x)
        k1, k2, k3, total = tl.reduce((k1, k2, k3, total), 1, _merge_twos)
    else:
        k3, x = _best_left(x, place, GROUP)
        k4 = _most_left(x)
        k1, k2, k3, k4, total = tl.reduce((k1, k2, k3, k4, total), 1, _merge_threes)

    # Beside the place of each listed logit stands the next one: the last of all is the bound.
    l0, l1, l2 = _both(k1, total.to(tl.uint64)), _both(k2, k1), _both(k3, k2)
    l3 = l2 * 0
    if DEPTH == 3:
        l3 = _both(k4, k3)
    record = tl.join(tl.join(l0, l2), tl.join(l1, l3)).reshape([N, ROWS, 4])
    group = tile * N + tl.arange(0, N)
    live = (group < groups)[:, None] & in_rows[None, :]
    cell = (row * groups)[None, :] + group[:, None]
    ptrs = lists_ptr + 4 * cell[:, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(ptrs, record, mask=live[:, :, None])


def config_of(halves: bool, row_tile: int) -> Config:
    """The configuration for a row tile; tilings of the same dtype have the same bits."""
    if not halves:
        return SINGLES
    return MANY_ROWS if row_tile == 64 else HALVES


def dot_of(x: Tensor, weight: Tensor) -> tl.dtype:
    """The operands' dtype in the product; float32 where it is an exact one."""
    # The interpreter's product of bfloat16 is wrong; on a GPU float32 is for float32 alone.
    if x.device.type == "cpu" or not x.element_size() == 2 == weight.element_size():
        return tl.float32
    return tl.bfloat16 if x.dtype is torch.bfloat16 else tl.float16


def scan(
    x: Tensor, weight: Tensor, lists: Tensor, config: Config, row_tile: int, depth: int
) -> None:
    """Fill `lists [R, groups, 4]`, int64, from `x [R, H]` and `weight [V, H]`."""
    (rows, size), vocab, device = x.shape, weight.shape[0], x.device
    dot = dot_of(x, weight)
    blackwell = architecture(device) >= 100 and dot is not tl.float32
    stage = config.block_h * (config.block_v * weight.element_size() + row_tile * x.element_size())
    _scan_kernel[(triton.cdiv(rows, row_tile), triton.cdiv(vocab, config.block_v))](
        x, weight, lists, rows, vocab, size, lists.shape[1], x.stride(0), weight.stride(0),
        DOT=dot, EVEN_V=vocab % config.block_v == 0, EVEN_H=size % config.block_h == 0,
        BLOCK_V=config.block_v, BLOCK_H=config.block_h, ROWS=row_tile, GROUP=config.group,
        DEPTH=depth, X_LEFT=config.x_left,
        # On sm_100 a warp holds whole rows of the accumulator, and 64 columns are too many to list.
        num_warps=2 * config.warps if blackwell and row_tile * depth > 128 else config.warps,
        # Else ptxas spills a word to fit a program more, for which no memory is left.
        maxnreg=None if dot is tl.float32 else 255,
        num_stages=max(1, min(config.stages, (shared_memory(device) - 4096) // stage)),
        **overlap(x),
    )  # fmt: skip
