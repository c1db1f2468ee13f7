"""Tree draft verification: a walk from the root, at each node over its children.

Node 0 is the root, the pending token; parents precede children; siblings stand in ascending node
index, the order drawn. Row i of the target logits is the law p of the token after node i, and row
i of q is the law that drew node i's children. At a node of depth d, with the noise at
`position + d + 1` (the accept uniform's index is the sibling's place among its siblings):

- sampled (without replacement) and deterministic children: `acceptance.py`;
- coupled: the token is the winner of the race over p; the child that is that token is accepted;
- temperature 0: the same with the argmax (lowest id of equals).

An accepted child is the next node; where none is, and at a leaf, the token drawn there ends the
walk. Block verification is linear only: its draws are the sampled law's and go by the sampled rule.
Without q, sampled children go by the deterministic rule, which is exact for any tree. Children
that their law cannot have drawn (second copies of a sibling among them) are passed over.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eesd_kernels.laws import Law
from eesd_kernels.reference.philox import philox_words
from eesd_kernels.reference.verify_node import Noise, Settings, draft_law, visit


def verify_tree(
    target_logits: Tensor,
    node_ids: Tensor,
    parent: Tensor,
    num_nodes: Tensor,
    q_ids: Tensor | None,
    q_probs: Tensor | None,
    law: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    words: Callable[..., Tensor] = philox_words,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, width, _ = target_logits.shape
    num_accepted = torch.zeros(batch, dtype=torch.int32, device=target_logits.device)
    path = torch.full((batch, width), -1, dtype=torch.int32, device=target_logits.device)
    token_ids, status = torch.full_like(path, -1), torch.zeros_like(num_accepted)
    for b in range(batch):
        settings = Settings.of(b, law, temperature, top_k, top_p, min_p)
        one = slice(b, b + 1)
        c = torch.zeros_like(base[one]) if settings.law == Law.COUPLED else base[one]
        noise = Noise(seed[one], position[one], c, words)
        above, names = parent[b, : int(num_nodes[b])].tolist(), node_ids[b].tolist()
        nodes, tokens, node = [], [], 0 if above else None
        while node is not None:
            nodes.append(node)
            below = [i for i in range(node + 1, len(above)) if above[i] == node]
            token, sibling = visit(
                target_logits[b, node], [names[i] for i in below],
                draft_law(q_ids, q_probs, (b, node)), settings, noise.after(len(nodes) - 1),
            )  # fmt: skip
            tokens.append(token)
            node = None if sibling is None else below[sibling]
        if tokens and tokens[-1] < 0:
            status[b] = 1
        elif tokens:
            num_accepted[b] = len(tokens) - 1
            path[b, : len(nodes)] = torch.tensor(nodes, dtype=torch.int32)
            token_ids[b, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    return num_accepted, path, token_ids, status
