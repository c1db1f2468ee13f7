"""Attention of a block of new tokens over the cache, in which the block's own K/V already lie.

`o_i = sum_s softmax_s(scale * q_i . k_s) v_s` over the slots that row i sees: all cached ones
`0 .. length-1`, and of the block (slots `length + j`) either `j <= i` (linear) or the bits of its
ancestry mask (a tree; bit j of `ancestry[b, i]` says that node j is i or an ancestor of i).
"""

import torch
from torch import Tensor


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    scale: float,
    ancestry: Tensor | None = None,
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
        k = k_cache[b, : length + live].to(inner).repeat_interleave(group, dim=1)
        v = v_cache[b, : length + live].to(inner).repeat_interleave(group, dim=1)
        if ancestry is None:
            sees = node[None, :live] <= node[:live, None]
        else:
            sees = (ancestry[b, :live, None] >> node[None, :live]) & 1 == 1
        mask = torch.cat((sees.new_ones(live, length), sees), dim=1)
        scores = torch.einsum("thd,shd->hts", q[b, :live].to(inner), k) * scale
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        out[b, :live] = torch.einsum("hts,shd->thd", p, v).to(q.dtype)
    return out
