"""Attention of a block of new tokens over the cache, in which the block's own K/V already lie.

`o_i = sum_s softmax_s(scale * q_i . k_s) v_s` over the slots that row i sees: all cached ones
`0 .. length-1`, and of the block (slots `length + j`) either `j <= i` (linear) or the bits of its
ancestry mask (a tree; bit j of `ancestry[b, i]` says that node j is i or an ancestor of i).

The position of a cached slot is the slot, that of a node `length` plus the number of its
ancestors. A sliding window of w shows the w last positions, the row's own among them.

Paged: slot s of sequence b is offset `s mod page_size` of page `block_table[b, s div page_size]`.
"""

import torch
from torch import Tensor


def _slots(cache: Tensor, b: int, count: int, block_table: Tensor | None) -> Tensor:
    """The first slots of a sequence, `[count, Hkv, D]`."""
    if block_table is None:
        return cache[b, :count]
    pages = block_table[b, : -(-count // cache.shape[1])].long()
    return cache[pages].flatten(0, 1)[:count]


def tree_attention(
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
    rows, heads = q.shape[1:3]
    group = heads // k_cache.shape[2]
    inner = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    node = torch.arange(rows, device=q.device)
    for b in range(q.shape[0]):
        live, length = int(num_rows[b]), int(lengths[b])
        if live == 0:
            continue
        k = _slots(k_cache, b, length + live, block_table)
        v = _slots(v_cache, b, length + live, block_table)
        k, v = (x.to(inner).repeat_interleave(group, dim=1) for x in (k, v))
        sees = node[None, :live] <= node[:live, None]
        if ancestry is not None:  # bits above a row's own are not looked at
            sees = sees & ((ancestry[b, :live, None] >> node[None, :live]) & 1 == 1)
        mask = torch.cat((sees.new_ones(live, length), sees), dim=1)
        if window is not None:
            own = length - 1 + sees.sum(1)  # a row sees its ancestors and itself
            place = torch.cat((torch.arange(length, device=q.device), own))
            mask &= place[None] > own[:, None] - window
        scores = torch.einsum("thd,shd->hts", q[b, :live].to(inner), k) * scale
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        out[b, :live] = torch.einsum("hts,shd->thd", p, v).to(q.dtype)
    return out
