"""Attention of a block of new tokens over the KV cache: linear blocks and trees.

q `[B, T, Hq, D]`; K and V `[B, S, Hkv, D]` (NHD), the block's own K/V already in slots
`lengths[b] + i`. Row i sees all `lengths[b]` cached slots and, of the block, rows `j <= i` or the
nodes named by its ancestry mask. Grouped-query heads; float32 softmax. Reads the live K/V once,
`2 B (length + T) Hkv D` numbers, and that bounds it. It never writes the cache.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import tree_attention_cpu
from eesd_kernels._library import register


def _cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    scale: float,
    ancestry: Tensor | None,
) -> Tensor:
    args = (q, k_cache, v_cache, lengths, num_rows, scale, ancestry)
    out = tree_attention_cpu(*args)
    return reference.tree_attention(*args) if out is None else out


tree_attention_op = register(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor num_rows,"
    " float scale, Tensor? ancestry) -> Tensor",
    reference=reference.tree_attention,
    cpu=_cpu,
    fake=lambda q, *_: q.new_empty(q.shape),
)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    *,
    scale: float | None = None,
    ancestry: Tensor | None = None,
) -> Tensor:
    """Attend from a block's rows to the cache and to each other.

    Args:
        q: `[B, T, Hq, D]` floating.
        k_cache, v_cache: `[B, S, Hkv, D]`; Hkv divides Hq.
        lengths: `[B]` int32, cached tokens before the block.
        num_rows: `[B]` int32, live rows, at most T; the others return zeros.
        scale: of the scores; `D ** -0.5` by default.
        ancestry: `[B, T]` int64 bit masks, T at most 64: bit j of `[b, i]` is set where node j
            is node i or an ancestor of it. None: a linear block.

    Returns:
        `[B, T, Hq, D]`, the dtype of q.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device.
    """
    check = Checks("tree_attention")
    check.tensor("q", q, ("B", "T", "Hq", "D"), FLOATING)
    check.tensor("k_cache", k_cache, ("B", "S", "Hkv", "D"), FLOATING)
    check.tensor("v_cache", v_cache, ("B", "S", "Hkv", "D"), k_cache.dtype)
    check.tensor("lengths", lengths, ("B",), torch.int32)
    check.tensor("num_rows", num_rows, ("B",), torch.int32)
    if q.shape[2] % k_cache.shape[2]:
        raise ValueError(
            f"tree_attention: q: expected Hq a multiple of Hkv = {k_cache.shape[2]}, "
            f"got Hq = {q.shape[2]}"
        )
    if ancestry is not None:
        check.tensor("ancestry", ancestry, ("B", "T"), torch.int64)
        if q.shape[1] > 64:
            raise ValueError(f"tree_attention: ancestry: expected T at most 64, got {q.shape[1]}")
    if scale is None:
        scale = q.shape[3] ** -0.5
    return tree_attention_op(q, k_cache, v_cache, lengths, num_rows, scale, ancestry)
