"""Linear draft verification: rejection sampling (Leviathan et al. 2023; Chen et al. 2023).

Row j of the target logits gives the law p of the token at `position + j + 1`; draft token
`t = draft_ids[j]` was drawn for that place by law q. With u uniform in [0, 1):

- sampled, deterministic: `acceptance.py` with one child: accept iff `u q(t) < p(t)`
  (`u < p(t)`); on rejection draw from `max(p - q, 0)` (p without t).
- coupled: the token is the winner of the race over p; accept iff t is that token.
- block: `block.py`; token i is tested with the noise at `position + i`, the token after m accepted
  ones races at `position + m + 1`. It reads the rows up to the first draft token of no target mass.
- temperature 0: the token is the argmax (lowest id of equals); accept iff t is that token.

Without q, sampled and block rows go by the deterministic rule, which is exact for any draft and
accepts less. A draft token that its law cannot have drawn is rejected and takes nothing from p.

The walk stops at the first rejection; a fully accepted draft earns a bonus token from the next
row. A draw is a race, `argmin E_x / r(x)`. A bad row that the walk reaches sets the status.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eesd_kernels.laws import Law
from eesd_kernels.reference.block import BlockWalk
from eesd_kernels.reference.philox import philox_words
from eesd_kernels.reference.verify_node import (
    Noise,
    Settings,
    SparseLaw,
    draft_law,
    draw,
    visit,
)


def _one_by_one(
    logits: Tensor, draft: list[int], q: list[SparseLaw | None], settings: Settings, noise: Noise
) -> list[int]:
    """The tokens that stand, one more than accepted; none after a bad row."""
    tokens: list[int] = []
    for j in range(len(draft) + 1):
        token, accepted = visit(logits[j], draft[j : j + 1], q[j], settings, noise.after(j))
        if token < 0:
            return []
        tokens.append(token)
        if accepted is None:
            break
    return tokens


def _as_a_block(
    logits: Tensor, draft: list[int], q: list[SparseLaw | None], settings: Settings, noise: Noise
) -> list[int]:
    """The same, by the block rule."""
    walk, rows = BlockWalk(), []
    for j, token in enumerate(draft):
        law = q[j]
        assert law is not None
        ids = list(law.ids)
        if token not in law.ids or law.w[ids.index(token)] == 0 or walk.stands[-1] == 0:
            break  # not a draw from q, or nothing stands from here on: the draft ends
        p = settings.target(logits[j])
        if p is None:
            return []
        outside = p.clone()
        outside[ids] = 0.0
        walk.add(p[ids].tolist(), law.w, float(outside.sum()), ids.index(token))
        rows.append((p, outside, ids))
    m = walk.accepted(lambda i: noise.after(i - 1).accept(sibling=0))
    if m < len(rows):
        p, outside, ids = rows[m]
        residual = walk.stands[m] * outside
        residual[ids] = torch.tensor(walk.residual[m], dtype=p.dtype, device=p.device)
    else:
        bonus = settings.target(logits[m])
        if bonus is None:
            return []
        p = residual = bonus
    return [*draft[:m], draw(residual, p, noise.after(m))]


def verify_linear(
    target_logits: Tensor,
    draft_ids: Tensor,
    draft_length: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    batch, width, _ = target_logits.shape
    num_accepted = torch.zeros(batch, dtype=torch.int32, device=target_logits.device)
    token_ids = torch.full((batch, width), -1, dtype=torch.int32, device=target_logits.device)
    status = torch.zeros_like(num_accepted)
    for b in range(batch):
        settings = Settings.of(b, law, temperature, top_k, top_p, min_p)
        one = slice(b, b + 1)
        c = torch.zeros_like(base[one]) if settings.law == Law.COUPLED else base[one]
        noise = Noise(seed[one], position[one], c, words)
        length = int(draft_length[b])
        draft = draft_ids[b, :length].tolist()
        q = [draft_law(q_ids, q_probs, (b, j)) for j in range(length)]
        block = settings.law == Law.BLOCK and settings.temperature > 0 and q_probs is not None
        verify = _as_a_block if block else _one_by_one
        tokens = verify(target_logits[b], draft, [*q, None], settings, noise)
        if tokens:
            num_accepted[b] = len(tokens) - 1
            token_ids[b, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        else:
            status[b] = 1
    return num_accepted, token_ids, status
