"""Rotary embedding of a block's queries and keys, fused with the write of K and V to the cache.

qkv `[B, T, (Hq + 2 Hkv) D]` is the fused projection; row i of sequence b goes to cache slot
`lengths[b] + i` and is rotated for position `lengths[b] + depth[b, i]` (depth i where none is
given, as in a linear block). Rows at or above `num_rows[b]` write nothing and return zeros, so
padded rows of a ragged batch are no-ops. The half-split form of Llama; float32 inside, products and
sums rounded one by one. Reads and writes each number once; beside a decoding step's products it is
latency. Row-invariant. The cache is contiguous or paged.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import rope_cache_write_cpu
from eesd_kernels._library import register, triton_op


def _cpu(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    depth: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    args = (qkv, cos, sin, k_cache, v_cache, lengths, num_rows, depth, block_table)
    out = rope_cache_write_cpu(*args)
    return reference.rope_cache_write(*args) if out is None else out


def _fake(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    depth: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    batch, rows, width = qkv.shape
    kv_heads, head_size = k_cache.shape[2:]
    return qkv.new_empty(batch, rows, width // head_size - 2 * kv_heads, head_size)


rope_cache_write_op = register(
    "rope_cache_write(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor lengths, Tensor num_rows, Tensor? depth=None, Tensor? block_table=None) -> Tensor",
    reference=reference.rope_cache_write,
    cpu=_cpu,
    cuda=triton_op("rope_cache_write", reference.rope_cache_write),
    fake=_fake,
)


def rope_cache_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    *,
    depth: Tensor | None = None,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate q and k, write k and v in place, return q.

    Args:
        qkv: `[B, T, (Hq + 2 Hkv) D]` floating.
        cos, sin: `[P, D / 2]` tables by absolute position.
        k_cache, v_cache: `[B, S, Hkv, D]`, D even, or with a block table
            `[pages, page_size, Hkv, D]`; written at slots `lengths[b] .. + num_rows[b] - 1`.
        lengths: `[B]` int32, cached tokens before the block; `lengths + num_rows <= S`.
        num_rows: `[B]` int32, live rows of the block, at most T.
        depth: `[B, T]` int32, distance of a tree node from its root.
        block_table: `[B, max_pages]` int32: slot s of sequence b is offset `s mod page_size` of
            page `block_table[b, s div page_size]`. Pages that the block lies in belong to one
            sequence alone.
        out: as the result, contiguous: written and returned, nothing is allocated.

    Returns:
        Rotated queries `[B, T, Hq, D]`, the dtype of qkv; zeros in dead rows.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range. On CUDA, where
        values are not looked at, a row with its slot outside the cache or its position outside
        the tables writes nothing to the cache, and its queries are NaN.
    """
    check = Checks("rope_cache_write")
    check.tensor("qkv", qkv, ("B", "T", "(Hq+2Hkv)D"), FLOATING)
    middle = ("B", "S") if block_table is None else ("pages", "page_size")
    check.tensor("k_cache", k_cache, (*middle, "Hkv", "D"), FLOATING)
    check.tensor("v_cache", v_cache, (*middle, "Hkv", "D"), k_cache.dtype)
    kv_heads, head_size = k_cache.shape[2:]
    check.size("Hkv", 1)
    if head_size < 2 or head_size % 2:
        raise ValueError(f"rope_cache_write: k_cache: expected D even, 2 or more, got {head_size}")
    check.tensor("cos", cos, ("P", head_size // 2), FLOATING)
    check.tensor("sin", sin, ("P", head_size // 2), cos.dtype)
    check.tensor("lengths", lengths, ("B",), torch.int32)
    check.tensor("num_rows", num_rows, ("B",), torch.int32)
    if depth is not None:
        check.tensor("depth", depth, ("B", "T"), torch.int32)
    if block_table is not None:
        check.tensor("block_table", block_table, ("B", "max_pages"), torch.int32)
    heads, rest = divmod(qkv.shape[2], head_size)
    if rest or heads <= 2 * kv_heads:
        raise ValueError(
            f"rope_cache_write: qkv: expected (Hq + 2 Hkv) D columns with Hkv = {kv_heads}, "
            f"D = {head_size} and Hq above 0, got {qkv.shape[2]}"
        )
    if qkv.device.type == "cpu":  # values are free to look at there
        _check_values(qkv.shape[1], cos.shape[0], k_cache, lengths, num_rows, depth, block_table)
    args = (qkv, cos, sin, k_cache, v_cache, lengths, num_rows, depth, block_table)
    if out is None:
        return rope_cache_write_op(*args)
    shape = ("B", "T", heads - 2 * kv_heads, "D")
    check.tensor("out", out, shape, qkv.dtype, contiguous=True)
    torch.ops.eesd.rope_cache_write.out(*args, out0=out)
    return out


def _check_values(
    rows: int,
    positions: int,
    k_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    depth: Tensor | None,
    block_table: Tensor | None,
) -> None:
    if bool(((num_rows < 0) | (num_rows > rows)).any()):
        raise ValueError(
            f"rope_cache_write: num_rows: expected 0 to {rows}, got {num_rows.tolist()}"
        )
    size = k_cache.shape[1]
    slots = size * (1 if block_table is None else block_table.shape[1])
    used = torch.where(num_rows > 0, lengths + num_rows, 0)
    if bool(((lengths < 0) | (used > slots)).any()):
        raise ValueError(
            f"rope_cache_write: lengths: expected the block's slots from 0 to {slots - 1}, "
            f"got lengths {lengths.tolist()} and num_rows {num_rows.tolist()}"
        )
    step = torch.arange(rows, dtype=torch.int32).expand(len(lengths), -1)
    live = step < num_rows[:, None]
    at = lengths[:, None] + (step if depth is None else depth)
    if bool((live & ((at < 0) | (at >= positions))).any()):
        raise ValueError(
            f"rope_cache_write: {'lengths' if depth is None else 'depth'}: expected positions "
            f"from 0 to {positions - 1}, as in cos, got {at.tolist()} in {num_rows.tolist()} rows"
        )
    if block_table is None or not live.any():
        return
    page = torch.where(live, lengths[:, None] + step, 0) // size
    page = block_table.gather(1, page.long())
    if bool((live & ((page < 0) | (page >= k_cache.shape[0]))).any()):
        raise ValueError(
            f"rope_cache_write: block_table: expected pages from 0 to {k_cache.shape[0] - 1} for "
            f"every slot of the block, got {block_table.tolist()} for lengths {lengths.tolist()}"
        )
