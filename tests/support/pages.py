"""Caches in pages, and paths of random trees."""

import random

import torch
from torch import Tensor


def pages_of(cache: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The same cache `[.., B, S, Hkv, D]` in shuffled pages, some of them nobody's, and its table.

    What no slot of the cache lies in holds random numbers.
    """
    *layers, batch, slots, heads, head_size = cache.shape
    count = -(-slots // size)
    order = torch.randperm(batch * count + 3)[: batch * count].view(batch, count).to(cache.device)
    pages = torch.randn(*layers, batch * count + 3, size, heads, head_size, device=cache.device)
    pages = pages.to(cache.dtype)
    slot = torch.arange(slots, device=cache.device)
    for b in range(batch):
        place = order[b, slot // size], slot % size
        pages[(..., *place, slice(None), slice(None))] = cache[..., b, :, :, :]
    return pages, order.to(torch.int32)


def unpaged(pages: Tensor, table: Tensor, slots: int) -> Tensor:
    """`[.., B, slots, Hkv, D]`."""
    rows = [pages[..., row.long(), :, :, :].flatten(-4, -3)[..., :slots, :, :] for row in table]
    return torch.stack(rows, -4)


def random_path(nodes: int, rng: random.Random) -> list[int]:
    """The path to a node of a random tree, -1 behind it; sometimes a whole line, or no path."""
    kind = rng.random()
    if kind < 0.1:
        return [-1] * nodes
    if kind < 0.2:
        path = list(range(rng.randint(1, nodes)))
    else:
        parent = [-1, *(rng.randint(max(0, i - 4), i - 1) for i in range(1, nodes))]
        node, path = rng.randrange(nodes), []
        while node >= 0:
            path.insert(0, node)
            node = parent[node]
    return path + [-1] * (nodes - len(path))
