"""Rotate q and k and write k and v to the cache, one launch: a program a row and a group of heads.

The heads of a group are all of q, all of k or all of v. The row's numbers are asked for before its
position is known. Products and sums are rounded one by one (no fused multiply-add), as in the
reference: the bits are equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.launch import overlap

PAIRS = 512  # of numbers that a program rotates


@triton.jit
def _rope_cache_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, lengths_ptr, num_rows_ptr, depth_ptr, table_ptr, q_ptr,
    rows, heads, kv_heads, slots, pages, columns, positions, stride_b, stride_row,
    k_page, k_slot, k_head, k_column, v_page, v_slot, v_head, v_column,
    D: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A contiguous cache is one of `PAGE` 0, its sequences `k_page` and `v_page` apart."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b, row = tl.program_id(0).to(tl.int64) // rows, tl.program_id(0) % rows
    length, live = tl.load(lengths_ptr + b), row < tl.load(num_rows_ptr + b)
    depth = row
    if depth_ptr is not None:
        depth = tl.load(depth_ptr + b * rows + row)

    group, q_groups = tl.program_id(1), tl.cdiv(heads, HEADS)
    kv_groups = tl.cdiv(kv_heads, HEADS)
    is_q, is_v = group < q_groups, group >= q_groups + kv_groups
    first = tl.where(is_q, 0, tl.where(is_v, heads + kv_heads, heads))
    group -= tl.where(is_q, 0, tl.where(is_v, q_groups + kv_groups, q_groups))
    head = group * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    mask = (head < tl.where(is_q, heads, kv_heads))[:, None] & (pair < D // 2)[None, :]
    # [HEADS, HALF]: pair i of a head is its numbers i and i + D / 2
    x_ptr = qkv_ptr + b * stride_b + row.to(tl.int64) * stride_row
    x_ptrs = x_ptr + ((first + head) * D)[:, None] + pair[None, :]
    low = tl.load(x_ptrs, mask=mask, other=0.0)
    high = tl.load(x_ptrs + D // 2, mask=mask, other=0.0)

    slot, position = length + row, length + depth
    known = (slot >= 0) & (slot < slots)
    place, offset = b, slot
    if PAGE != 0:
        page = tl.load(table_ptr + b * columns + slot // PAGE, mask=known, other=-1)
        known &= (page >= 0) & (page < pages)
        place, offset = page.to(tl.int64), slot % PAGE
    offset = offset.to(tl.int64)
    known &= (position >= 0) & (position < positions)
    if not is_v:
        # Once a head: as a row for all of them it would go through shared memory.
        at = position.to(tl.int64) * (D // 2) + pair[None, :] + tl.zeros([HEADS, HALF], tl.int32)
        inside = mask & known & live
        cos = tl.load(cos_ptr + at, mask=inside, other=float("nan")).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=inside, other=float("nan")).to(tl.float32)
        a, c = low.to(tl.float32), high.to(tl.float32)
        low = (a * cos - c * sin).to(low.dtype)
        high = (c * cos + a * sin).to(high.dtype)

    if is_q:
        q_ptrs = q_ptr + (tl.program_id(0).to(tl.int64) * heads + head)[:, None] * D + pair[None, :]
        tl.store(q_ptrs, tl.where(live, low, 0.0), mask=mask)
        tl.store(q_ptrs + D // 2, tl.where(live, high, 0.0), mask=mask)
    elif is_v:
        mask &= known & live
        v_ptr += place * v_page + offset * v_slot
        v_ptrs = v_ptr + head.to(tl.int64)[:, None] * v_head + pair[None, :] * v_column
        tl.store(v_ptrs, low.to(v_ptr.dtype.element_ty), mask=mask)
        tl.store(v_ptrs + D // 2 * v_column, high.to(v_ptr.dtype.element_ty), mask=mask)
    else:
        mask &= known & live
        k_ptr += place * k_page + offset * k_slot
        k_ptrs = k_ptr + head.to(tl.int64)[:, None] * k_head + pair[None, :] * k_column
        tl.store(k_ptrs, low.to(k_ptr.dtype.element_ty), mask=mask)
        tl.store(k_ptrs + D // 2 * k_column, high.to(k_ptr.dtype.element_ty), mask=mask)


def rope_cache_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    depth: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> Tensor | None:
    if qkv.dtype is torch.float64:
        return None
    batch, rows, width = qkv.shape
    pages, size, kv_heads, head_size = k_cache.shape
    heads = width // head_size - 2 * kv_heads
    q = out[0] if out else qkv.new_empty(batch, rows, heads, head_size)
    if not q.numel():
        return q
    x = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    paged = block_table is not None
    table = block_table.contiguous() if block_table is not None else None
    columns = table.shape[1] if table is not None else 1
    half = triton.next_power_of_2(head_size // 2)
    per_group = max(1, PAIRS // half)
    groups = triton.cdiv(heads, per_group) + 2 * triton.cdiv(kv_heads, per_group)
    _rope_cache_write_kernel[(batch * rows, groups)](
        x, cos.contiguous(), sin.contiguous(), k_cache, v_cache, lengths.contiguous(),
        num_rows.contiguous(), depth.contiguous() if depth is not None else None, table, q,
        rows, heads, kv_heads, columns * size, pages, columns, cos.shape[0],
        x.stride(0), x.stride(1), *k_cache.stride(), *v_cache.stride(),
        D=head_size, PAGE=size if paged else 0, HEADS=per_group, HALF=half,
        num_warps=max(1, min(4, per_group * half * x.element_size() // 512)),
        enable_fp_fusion=False, **overlap(qkv),
    )  # fmt: skip
    return q
