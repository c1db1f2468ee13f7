"""Rollback of a tree draft: the accepted path's K and V, made contiguous in every layer.

Node i of the draft lies in slot `c + i`, `c = lengths[b]`. The path `0 = a_0 < a_1 < .. < a_m`
moves slot `c + a_d` to `c + d`, all reads before all writes: slots overlap. The new length is
`c + m + 1`; a row without a path (-1 throughout) keeps its bytes and its length. Paged: slot s of
sequence b is offset `s mod page_size` of page `block_table[b, s div page_size]`.
"""

import torch
from torch import Tensor


def rollback_kv(
    cache: Tensor, path: Tensor, lengths: Tensor, block_table: Tensor | None = None
) -> Tensor:
    new_lengths = lengths.clone()
    for b in range(path.shape[0]):
        nodes = path[b][path[b] >= 0].long()
        step = torch.arange(len(nodes), device=path.device)
        start, end = int(lengths[b]) + nodes, int(lengths[b]) + step
        if block_table is None:
            cache[:, :, b, end] = cache[:, :, b, start]  # the right side is a copy
        else:
            size, pages = cache.shape[3], block_table[b].long()
            staged = cache[:, :, pages[start // size], start % size]
            cache[:, :, pages[end // size], end % size] = staged
        new_lengths[b] += len(nodes)
    return new_lengths
