"""Attention of a block of new tokens over the KV cache: linear blocks and trees.

q `[B, T, Hq, D]`; K and V `[B, S, Hkv, D]` (NHD) or pages, the block's own K/V already in slots
`lengths[b] + i`. Row i sees all `lengths[b]` cached slots and, of the block, rows `j <= i` or the
nodes named by its ancestry mask; a sliding window hides what lies too far back. Grouped-query
heads; float32 softmax. Reads the live K/V once, `2 B (length + T) Hkv D` numbers, and that bounds
it. On CUDA a row has the same bits alone, in any block or tree, in pages or not (the argument
stands in `triton/tree_attention.py`); float64 and heads above 256 go through the reference. It
never writes the cache.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import tree_attention_cpu
from eesd_kernels._library import register, triton_op


def _cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    scale: float,
    ancestry: Tensor | None = None,
    block_table: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    args = (q, k_cache, v_cache, lengths, num_rows, scale, ancestry, block_table, window)
    out = tree_attention_cpu(*args)
    return reference.tree_attention(*args) if out is None else out


tree_attention_op = register(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor num_rows,"
    " float scale, Tensor? ancestry=None, Tensor? block_table=None, int? window=None) -> Tensor",
    reference=reference.tree_attention,
    cpu=_cpu,
    cuda=triton_op("tree_attention", reference.tree_attention),
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
    block_table: Tensor | None = None,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from a block's rows to the cache and to each other.

    Args:
        q: `[B, T, Hq, D]` floating.
        k_cache, v_cache: `[B, S, Hkv, D]`, or with a block table `[pages, page_size, Hkv, D]`;
            Hkv divides Hq.
        lengths: `[B]` int32, cached tokens before the block.
        num_rows: `[B]` int32, live rows, at most T; the others return zeros.
        scale: of the scores; `D ** -0.5` by default.
        ancestry: `[B, T]` int64 bit masks, T at most 64: bit j of `[b, i]` is set where node j
            is node i or an ancestor of it. None: a linear block.
        block_table: `[B, max_pages]` int32: slot s of sequence b is offset `s mod page_size` of
            page `block_table[b, s div page_size]`.
        window: a row sees positions fewer than `window` before its own (1: itself alone); a
            node's position is `lengths` plus the number of its ancestors. None: all.
        out: as the result, contiguous: written and returned, nothing is allocated but scratch.

    Returns:
        `[B, T, Hq, D]`, the dtype of q.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("tree_attention")
    check.tensor("q", q, ("B", "T", "Hq", "D"), FLOATING)
    middle = ("B", "S") if block_table is None else ("pages", "page_size")
    check.tensor("k_cache", k_cache, (*middle, "Hkv", "D"), FLOATING)
    check.tensor("v_cache", v_cache, (*middle, "Hkv", "D"), k_cache.dtype)
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
    if window is not None:
        check.integer("window", window, 1, 2**31 - 1)
    if block_table is not None:
        check.tensor("block_table", block_table, ("B", "max_pages"), torch.int32)
        if q.device.type == "cpu":  # values are free to look at there
            _check_pages(k_cache, lengths, num_rows, block_table)
    if scale is None:
        scale = q.shape[3] ** -0.5
    arguments = (
        q, k_cache, v_cache, lengths, num_rows, scale, ancestry, block_table, window
    )  # fmt: skip
    if out is None:
        return tree_attention_op(*arguments)
    check.tensor("out", out, ("B", "T", "Hq", "D"), q.dtype, contiguous=True)
    torch.ops.eesd.tree_attention.out(*arguments, out0=out)
    return out


def _check_pages(k_cache: Tensor, lengths: Tensor, num_rows: Tensor, block_table: Tensor) -> None:
    pages, size = k_cache.shape[:2]
    used = torch.where(num_rows > 0, lengths + num_rows + size - 1, 0) // max(size, 1)
    index = torch.arange(block_table.shape[1])
    bad = (index < used[:, None]) & ((block_table < 0) | (block_table >= pages))
    if bool((used > block_table.shape[1]).any()) or bool(bad.any()):
        raise ValueError(
            f"tree_attention: block_table: expected pages from 0 to {pages - 1} for every slot "
            f"in use, got {block_table.tolist()} for lengths {lengths.tolist()}"
        )
