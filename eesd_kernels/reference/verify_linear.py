"""Linear draft verification: rejection sampling (Leviathan et al. 2023; Chen et al. 2023).

Row j of the target logits gives the law p of the token at `position + j + 1`; draft token
`t = draft_ids[j]` was drawn for that place by law q. With u uniform in [0, 1):

- sampled, deterministic: `NodeWalk` of `acceptance.py` with one child: accept iff `u q(t) < p(t)`
  (`u < p(t)`); on rejection draw from `max(p - q, 0)` (p without t).
- coupled: the token is the winner of the race over p; accept iff t is that token.
- temperature 0: the token is the argmax (lowest id of equals); accept iff t is that token.

The walk stops at the first rejection; a fully accepted draft earns a bonus token from the next
row. A draw is a race, `argmin E_x / r(x)`. A bad row that the walk reaches sets the status.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eesd_kernels.laws import Law, Purpose
from eesd_kernels.reference.acceptance import NodeWalk
from eesd_kernels.reference.philox import accept_uniform, philox_words, race_exponential
from eesd_kernels.reference.target_law import target_law


class Noise(NamedTuple):
    """The random words of one place: seed, position and base `[1]`, and where words come from."""

    seed: Tensor
    position: Tensor
    base: Tensor
    words: Callable[..., Tensor]

    def race(self, weights: Tensor) -> int:
        """`argmin E_x / w(x)` with the target's noise."""
        words = self.words(self.seed, self.position, self.base, Purpose.TARGET, weights.numel())[0]
        return int((weights.log() - race_exponential(words).log()).argmax())

    def accept(self, sibling: int) -> float:
        """The uniform that tests a sibling."""
        # Word 0 of the call whose index is the sibling.
        ids = torch.tensor([4 * sibling], device=self.seed.device)
        words = self.words(self.seed, self.position, self.base, Purpose.ACCEPT, ids)
        return float(accept_uniform(words))


def _reject_or_draw(
    p: Tensor, draft: int, ids: list[int], w: list[float], law: int, noise: Noise
) -> tuple[int, bool]:
    """Accept one draft token, or draw the token that replaces it."""
    outside = p.clone()
    outside[ids] = 0.0
    walk = NodeWalk(p[ids].tolist(), w, float(outside.sum()), Law(law))
    if draft in ids:  # a token that its law cannot have drawn is passed over: r stays p
        child = ids.index(draft)
        if walk.accepts(child, noise.accept(sibling=0)):
            return draft, True
        walk.reject(child)
    residual = outside
    residual[ids] = torch.tensor(walk.r, dtype=p.dtype, device=p.device)
    # A residual without mass can only be rounding: p and q are then equal.
    return noise.race(residual if float(residual.sum()) > 0 else p), False


def verify_linear(
    target_logits: Tensor,
    draft_ids: Tensor,
    draft_length: Tensor,
    q_ids: Tensor,
    q_probs: Tensor,
    law: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
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
        t_b, law_b, length = float(temperature[b]), int(law[b]), int(draft_length[b])
        coupled = law_b == Law.COUPLED
        one = slice(b, b + 1)
        for j in range(length + 1):
            row = target_logits[b, j]
            draft = int(draft_ids[b, j]) if j < length else -1
            c = torch.zeros_like(base[one]) if coupled else base[one]
            noise = Noise(seed[one], position[one] + j + 1, c, words)
            if t_b == 0:
                top = row.max()
                token = int((row == top).nonzero()[0]) if bool(top.isfinite()) else -1
                accepted = token == draft
            else:
                p = target_law(row, t_b, int(top_k[b]), float(top_p[b]), float(min_p[b]))
                token, accepted = -1, False
                if p is not None and (coupled or draft < 0):
                    token = noise.race(p)
                    accepted = token == draft
                elif p is not None:
                    ids, w = [draft], [1.0]
                    if law_b == Law.SAMPLED:
                        inside = q_ids[b, j] >= 0
                        ids = q_ids[b, j][inside].tolist()
                        w = q_probs[b, j][inside].double().tolist()
                    token, accepted = _reject_or_draw(p, draft, ids, w, law_b, noise)
            if token < 0:
                status[b], num_accepted[b] = 1, 0
                token_ids[b] = -1
                break
            token_ids[b, j] = token
            if not accepted:
                num_accepted[b] = j
                break
        else:
            raise AssertionError("the bonus row accepts nothing")
    return num_accepted, token_ids, status
