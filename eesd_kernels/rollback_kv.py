"""Keep a tree draft's accepted path in the KV cache: its slots become contiguous, in all layers.

The draft's node i lies in slot `c + i`; the path `0 = a_0 < a_1 < .. < a_m` moves slot `c + a_d`
to `c + d`, K and V of every layer, staged, since slots overlap. Moves at most `4 layers m Hkv D`
numbers a sequence (read and write of K and V) and is bound by that; a linear path moves none. One
launch for all layers on CUDA, where a slot or page outside the cache is left alone.
It returns the lengths `c + m + 1` and clears nothing: slots behind them are never read again.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._library import register, triton_op

rollback_kv_op = register(
    "rollback_kv(Tensor(a!) cache, Tensor path, Tensor lengths, Tensor? block_table=None)"
    " -> Tensor",
    reference=reference.rollback_kv,
    cuda=triton_op("rollback_kv", reference.rollback_kv),
    fake=lambda cache, path, lengths, *_: lengths.new_empty(lengths.shape),
)


def rollback_kv(
    cache: Tensor,
    path: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Move the accepted nodes of each sequence to the slots behind its cached tokens, in place.

    Args:
        cache: `[layers, 2, B, S, Hkv, D]` floating, K and V of all layers; or, with a block
            table, `[layers, 2, pages, page_size, Hkv, D]`.
        path: `[B, T]` int32 from `verify_tree`: 0, then rising node indices, then -1. A row of -1
            alone (a bad row, or one that sat out) keeps its bytes and its length.
        lengths: `[B]` int32, cached tokens c before the draft.
        block_table: `[B, max_pages]` int32: slot s of sequence b is offset `s mod page_size` of
            page `block_table[b, s div page_size]`. Pages that the draft lies in belong to one
            sequence alone.
        out: `[B]` int32, contiguous, not `lengths` itself: written and returned, nothing is
            allocated.

    Returns:
        new lengths int32 `[B]`, `c + m + 1`.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("rollback_kv")
    middle = ("B", "S") if block_table is None else ("pages", "page_size")
    check.tensor("cache", cache, ("layers", 2, *middle, "Hkv", "D"), FLOATING)
    check.tensor("path", path, ("B", "T"), torch.int32)
    check.tensor("lengths", lengths, ("B",), torch.int32)
    if block_table is not None:
        check.tensor("block_table", block_table, ("B", "max_pages"), torch.int32)
    if cache.device.type == "cpu":  # values are free to look at there
        _check_values(cache, path, lengths, block_table)
    if out is None:
        return rollback_kv_op(cache, path, lengths, block_table)
    check.tensor("out", out, ("B",), torch.int32, contiguous=True)
    if out.numel() and out.data_ptr() == lengths.data_ptr():  # programs read what another writes
        raise ValueError("rollback_kv: out: expected another tensor than lengths, got lengths")
    torch.ops.eesd.rollback_kv.out(cache, path, lengths, block_table, out0=out)
    return out


def _check_values(cache: Tensor, path: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    live = path >= 0
    before, after = path[:, :-1], path[:, 1:]
    if bool((path < -1).any() | (live[:, :1] & (path[:, :1] != 0)).any()) or bool(
        (live[:, 1:] & ((before < 0) | (after <= before))).any()
    ):
        raise ValueError(
            f"rollback_kv: path: expected 0, rising node indices, then -1, got {path.tolist()}"
        )
    capacity = cache.shape[3] * (1 if block_table is None else block_table.shape[1])
    deepest = path.amax(1) if path.shape[1] else lengths.new_full(lengths.shape, -1)
    if bool((lengths < 0).any()) or bool(((deepest >= 0) & (lengths + deepest >= capacity)).any()):
        raise ValueError(
            f"rollback_kv: lengths: expected every node's slot from 0 to {capacity - 1}, "
            f"got lengths {lengths.tolist()} and path {path.tolist()}"
        )
    if block_table is None:
        return
    step = torch.arange(path.shape[1], dtype=torch.int32)
    for slot in (path, step.expand_as(path)):
        page = torch.where(live, lengths[:, None] + slot, 0) // cache.shape[3]
        used = block_table.gather(1, page.long()) if block_table.shape[1] else page
        if bool((live & ((used < 0) | (used >= cache.shape[2]))).any()):
            raise ValueError(
                f"rollback_kv: block_table: expected pages from 0 to {cache.shape[2] - 1} "
                f"where the path lies, got {block_table.tolist()}"
            )
