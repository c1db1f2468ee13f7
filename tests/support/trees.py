"""Random trees of drafts, awkward on purpose, as arguments of `verify_tree`."""

from typing import Any

import torch

from eesd_kernels import Law

I32 = torch.int32


def random_parents(rows: int, nodes: int, g: torch.Generator) -> torch.Tensor:
    """int32 `[rows, nodes]`: each node's parent among the last few before it, or any."""
    i = torch.arange(nodes, device=g.device)
    near = i - 1 - torch.randint(0, 4, (rows, nodes), generator=g, device=g.device)
    share = torch.rand(2, rows, nodes, generator=g, device=g.device)
    parent = torch.where(share[0] < 0.6, near.clamp(min=0), (share[1] * i).long())
    parent[:, 0] = -1
    return parent.to(I32)


def tree_drafts(
    rows: int,
    nodes: int,
    vocab: int,
    k: int,
    laws: list[Law],
    *,
    seed: int = 0,
    filters: bool = False,
    dtype: torch.dtype = torch.float32,
    sharp: float = 3.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Laws, temperatures, sizes and shapes differ by row; filters where they are asked for.

    Children are likely tokens of their draft law, now and then one that a sibling is already, one
    that no law has drawn, or -1.
    """
    g = torch.Generator(device).manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g, device=device)

    logits = torch.empty(rows, nodes, vocab, device=device).normal_(0, sharp, generator=g)
    logits = logits.to(dtype)
    near = logits + torch.empty(rows, nodes, vocab, device=device).normal_(generator=g)
    values, q_ids = near.topk(k)
    each, parent = torch.arange(rows, device=device), random_parents(rows, nodes, g)
    place = (uniform(rows, nodes) ** 2 * min(k, 4)).long()
    token = q_ids[each[:, None], parent.clamp(min=0).long(), place]
    odd, anything = uniform(rows, nodes), (uniform(rows, nodes) * vocab).long()
    token = torch.where(odd < 0.05, anything, torch.where(odd > 0.97, -1, token))
    heats = torch.tensor([1.0, 0.6, 0.0, 1.5, 1.0], device=device)
    on = filters * (each % 3 > 0)
    return {
        "target_logits": logits,
        "node_ids": token.to(I32),
        "parent": parent,
        "num_nodes": nodes - (uniform(rows) ** 2 * (nodes / 2 + 1)).to(I32),
        "q_ids": q_ids.to(I32),
        "q_probs": values.float().softmax(-1),
        "law": torch.tensor([int(x) for x in laws], dtype=I32, device=device)[each % len(laws)],
        "temperature": heats[each // len(laws) % 5],
        "top_k": (uniform(rows) * (vocab // 2) * on).to(I32),
        "top_p": 1 - uniform(rows) * 0.5 * on,
        "min_p": uniform(rows) * 0.1 * on,
        "seed": ((uniform(rows).double() - 0.5) * 2**62).long(),
        "position": (uniform(rows) * 9999).to(I32) + 1,
        "base": (uniform(rows) * 9999).to(I32) + 1,
    }


def without_q(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "q_ids": None, "q_probs": None}


def without_filters(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "top_k": None, "top_p": None, "min_p": None}
