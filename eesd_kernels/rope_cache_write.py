"""Rotary embedding of a block's queries and keys, fused with the write of K and V to the cache.

qkv `[B, T, (Hq + 2 Hkv) D]` is the fused projection; row i of sequence b goes to cache slot
`lengths[b] + i` and is rotated for position `lengths[b] + depth[b, i]` (depth i where none is
given, as in a linear block). Rows at or above `num_rows[b]` write nothing and return zeros, so
padded rows of a ragged batch are no-ops. The half-split form of Llama; float32 inside.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import rope_cache_write_cpu
from eesd_kernels._library import register


def _cpu(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    depth: Tensor | None,
) -> Tensor:
    args = (qkv, cos, sin, k_cache, v_cache, lengths, num_rows, depth)
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
    depth: Tensor | None,
) -> Tensor:
    batch, rows, width = qkv.shape
    kv_heads, head_size = k_cache.shape[2:]
    return qkv.new_empty(batch, rows, width // head_size - 2 * kv_heads, head_size)


rope_cache_write_op = register(
    "rope_cache_write(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor lengths, Tensor num_rows, Tensor? depth) -> Tensor",
    reference=reference.rope_cache_write,
    cpu=_cpu,
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
) -> Tensor:
    """Rotate q and k, write k and v in place, return q.

    Args:
        qkv: `[B, T, (Hq + 2 Hkv) D]` floating.
        cos, sin: `[P, D / 2]` tables by absolute position.
        k_cache, v_cache: `[B, S, Hkv, D]`, written at slots `lengths[b] .. + num_rows[b] - 1`.
        lengths: `[B]` int32, cached tokens before the block; `lengths + num_rows <= S`.
        num_rows: `[B]` int32, live rows of the block, at most T.
        depth: `[B, T]` int32, distance of a tree node from its root.

    Returns:
        Rotated queries `[B, T, Hq, D]`, the dtype of qkv; zeros in dead rows.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device. Slots beyond the
        cache raise `IndexError` on the CPU.
    """
    check = Checks("rope_cache_write")
    check.tensor("qkv", qkv, ("B", "T", "(Hq+2Hkv)D"), FLOATING)
    check.tensor("k_cache", k_cache, ("B", "S", "Hkv", "D"), FLOATING)
    check.tensor("v_cache", v_cache, ("B", "S", "Hkv", "D"), k_cache.dtype)
    half = k_cache.shape[3] // 2
    check.tensor("cos", cos, ("P", half), FLOATING)
    check.tensor("sin", sin, ("P", half), cos.dtype)
    check.tensor("lengths", lengths, ("B",), torch.int32)
    check.tensor("num_rows", num_rows, ("B",), torch.int32)
    if depth is not None:
        check.tensor("depth", depth, ("B", "T"), torch.int32)
    heads, rest = divmod(qkv.shape[2], k_cache.shape[3])
    if rest or heads <= 2 * k_cache.shape[2]:
        raise ValueError(
            f"rope_cache_write: qkv: expected (Hq + 2 Hkv) D columns with Hkv = "
            f"{k_cache.shape[2]}, D = {k_cache.shape[3]} and Hq above 0, got {qkv.shape[2]}"
        )
    return rope_cache_write_op(qkv, cos, sin, k_cache, v_cache, lengths, num_rows, depth)
