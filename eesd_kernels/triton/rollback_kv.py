"""Move the accepted path's K and V, all layers in one launch, and write the new lengths.

A program has one sequence, a slice of its tokens' columns and a run of *planes* (K or V of a
layer). It stages up to `group` tokens of so many planes in registers, by rising depth, then stores
them. Slots overlap, and that order is safe: what one group stores lies below all that later groups
of the plane load, since the d-th token comes from slot `c + a_d` with `a_d >= d` rising. Bytes are
copied, so any dtype does. Programs of a sequence with nothing to move read its path and end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.launch import overlap


class Tiling(NamedTuple):
    """How the bytes are dealt to programs and threads; it decides none."""

    slice: int  # bytes of a token's columns, 16 a thread
    group: int  # tokens staged at once,
    planes: int  # of so many planes each
    spread: int  # threads that share the tokens of a column


FEW = Tiling(512, 8, 1, 4)  # time is latency: two loads a thread at a time
FEW_BELOW = 2048  # programs
MANY = Tiling(2048, 8, 1, 2)
PROGRAMS = 1056  # instead of more, longer runs of planes: all have read their path at once
"""A trade: at batch 64 on an H200 1.5 us over an empty kernel if nothing moves, 147 us for five
tokens each; 4,096 programs of `spread` 1 took 4.5 and 138 us."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _fetch(ptr, size):
    """The first bytes from ptr on into the L2: a hint that reads nothing, so it needs no wait."""
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .u32 t; .reg .u64 a; mov.u32 t, %tid.x; shl.b32 t, t, 7;
        setp.lt.u32 p, t, $2; cvt.u64.u32 a, t; add.u64 a, a, $1; @p prefetch.global.L2 [a];
        mov.u32 $0, 0; }""",
        "=r,l,r", [ptr.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _place(table_ptr, slot, slots, pages, stride_page, stride_slot, PAGE: tl.constexpr):
    """Where a slot `[GROUP]` of a sequence lies, and whether it lies anywhere."""
    known = (slot >= 0) & (slot < slots)
    if PAGE == 0:
        at = slot.to(tl.int64) * stride_slot
    else:
        page = tl.load(table_ptr + slot // PAGE, mask=known, other=-1)
        known &= (page >= 0) & (page < pages)
        at = page.to(tl.int64) * stride_page + (slot % PAGE).to(tl.int64) * stride_slot
    return at, known


@triton.jit(do_not_specialize=["planes", "run"])
def _rollback_kv_kernel(
    cache_ptr, path_ptr, lengths_ptr, table_ptr, new_ptr, planes, run, nodes, width, slots, pages,
    columns, stride_layer, stride_kv, stride_page, stride_slot, stride_head, stride_column,
    D: tl.constexpr, DENSE: tl.constexpr, PAGE: tl.constexpr, NODES: tl.constexpr,
    GROUP: tl.constexpr, PLANES: tl.constexpr, SLICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has `run` times PLANES planes.

    A contiguous cache is one of `PAGE` 0, its sequences `stride_page` apart.
    """
    b = tl.program_id(0).to(tl.int64)
    depth = tl.arange(0, NODES)
    if PDL:
        if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
            _fetch(path_ptr + b * nodes, nodes * 4)
            _fetch(lengths_ptr + b, 4)
            if PAGE:
                _fetch(table_ptr + b * columns, tl.minimum(columns * 4, 4096))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    length = tl.load(lengths_ptr + b)
    path = tl.load(path_ptr + b * nodes + depth, mask=depth < nodes, other=-1)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(new_ptr + b, length + tl.sum((path >= 0).to(tl.int32), 0))
    moves = tl.sum((path > depth).to(tl.int32), 0)
    start = tl.sum((path >= 0).to(tl.int32), 0) - moves  # those before it stand where they belong

    column = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    at = column
    if not DENSE:
        at = column // D * stride_head + column % D * stride_column
    first = tl.program_id(1) * run * PLANES
    count, each = tl.minimum(run, tl.cdiv(planes - first, PLANES)) * moves, 1.0 / moves
    if PAGE == 0:
        cache_ptr += b * stride_page
    else:
        table_ptr += b * columns
    for group in range(0, count, GROUP):
        turn = group + tl.arange(0, GROUP)
        # turn div moves, a multiplication: exact below 2^20 turns, 64 tokens of 8,192 layers.
        over = ((turn.to(tl.float32) + 0.5) * each).to(tl.int32)
        to, live = start + turn - over * moves, turn < count
        node = tl.load(path_ptr + b * nodes + to, mask=live, other=-1)
        here, is_here = _place(
            table_ptr, length + node, slots, pages, stride_page, stride_slot, PAGE
        )
        there, is_there = _place(
            table_ptr, length + to, slots, pages, stride_page, stride_slot, PAGE
        )
        live &= (node > to) & is_here & is_there
        # [PLANES, GROUP]
        plane = first + over[None, :] * PLANES + tl.arange(0, PLANES)[:, None]
        base = (plane >> 1).to(tl.int64) * stride_layer + (plane & 1).to(tl.int64) * stride_kv
        mask = (live[None, :] & (plane < planes))[:, :, None] & (column < width)[None, None, :]
        here, there = (base + here[None, :])[:, :, None], (base + there[None, :])[:, :, None]
        at_all = at[None, None, :]  # [PLANES, GROUP, SLICE]
        staged = tl.load(cache_ptr + here + at_all, mask=mask, other=0)
        tl.debug_barrier()  # every thread has loaded before one stores
        tl.store(cache_ptr + there + at_all, staged, mask=mask)


def rollback_kv(
    cache: Tensor,
    path: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> Tensor:
    layers, two, _, size, heads, head_size = cache.shape
    batch, nodes = path.shape
    new = out[0] if out else lengths.new_empty(batch)
    if not batch:
        return new
    planes, width, element = layers * two, heads * head_size, cache.element_size()
    strides = cache.stride()
    tiling = FEW
    programs = triton.cdiv(planes, FEW.planes) * batch * triton.cdiv(width * element, FEW.slice)
    if programs > FEW_BELOW:
        tiling = MANY
    per_slice = min(triton.next_power_of_2(max(width, 1)), tiling.slice // element)
    slices, blocks = triton.cdiv(width, per_slice), triton.cdiv(planes, tiling.planes)
    run = max(1, triton.cdiv(blocks * batch * slices, PROGRAMS))
    page = size if block_table is not None else 0
    table = block_table.contiguous() if block_table is not None else None
    columns = table.shape[1] if table is not None else 1
    _rollback_kv_kernel[(batch, max(1, triton.cdiv(blocks, run)), max(1, slices))](
        cache.view(BITS[element]), path.contiguous(), lengths.contiguous(), table, new,
        planes, run, nodes, width, columns * size, cache.shape[2], columns, *strides,
        D=head_size, DENSE=strides[5] == 1 and (heads == 1 or strides[4] == head_size),
        PAGE=page, NODES=triton.next_power_of_2(max(nodes, 1)), GROUP=tiling.group,
        PLANES=tiling.planes, SLICE=per_slice,
        num_warps=max(1, per_slice * element // 512) * tiling.spread, **overlap(cache),
    )  # fmt: skip
    return new
