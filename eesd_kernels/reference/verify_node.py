"""What both verifiers share: a sequence's settings, its noise, its draft law, and one node.

Noise is keyed by depth: the tokens after a node at depth d stand at `position + d + 1`; children
are tested, and the race where none is accepted is run, with that position and the round base. The
coupled law races without the round base, so its token is plain sampling's.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eesd_kernels.laws import Law, Purpose
from eesd_kernels.reference.acceptance import NodeWalk, offer
from eesd_kernels.reference.philox import accept_uniform, race_exponential
from eesd_kernels.reference.target_law import target_law


class SparseLaw(NamedTuple):
    """A draft law: weights w on distinct ids."""

    ids: Sequence[int]
    w: list[float]


def draft_law(
    q_ids: Tensor | None, q_probs: Tensor | None, at: tuple[int, int]
) -> SparseLaw | None:
    """The law at `[b, j]`: sparse (ids of -1 are padding), dense, or none."""
    if q_probs is None:
        return None
    q = q_probs[at].double()
    if q_ids is None:
        return SparseLaw(range(q.numel()), q.tolist())
    inside = q_ids[at] >= 0
    return SparseLaw(q_ids[at][inside].tolist(), q[inside].tolist())


class Noise(NamedTuple):
    """The random words of one place: seed, position and base `[1]`, and where words come from."""

    seed: Tensor
    position: Tensor
    base: Tensor
    words: Callable[..., Tensor]

    def after(self, depth: int) -> "Noise":
        """The noise of what follows a node at that depth."""
        return self._replace(position=self.position + depth + 1)

    def race(self, weights: Tensor) -> int:
        """`argmin E_x / w(x)` with the target's noise."""
        words = self.words(self.seed, self.position, self.base, Purpose.TARGET, weights.numel())[0]
        return int((weights.log() - race_exponential(words).log()).argmax())

    def accept(self, sibling: int) -> float:
        """The uniform that tests a sibling: word 0 of the call whose index is the sibling."""
        ids = torch.tensor([4 * sibling], device=self.seed.device)
        words = self.words(self.seed, self.position, self.base, Purpose.ACCEPT, ids)
        return float(accept_uniform(words))


class Settings(NamedTuple):
    """How one sequence's tokens are chosen."""

    law: Law
    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(
        cls,
        b: int,
        law: Tensor,
        temperature: Tensor,
        top_k: Tensor | None,
        top_p: Tensor | None,
        min_p: Tensor | None,
    ) -> "Settings":
        """Those of sequence b; a filter that is None is off."""
        return cls(
            Law(int(law[b])),
            float(temperature[b]),
            0 if top_k is None else int(top_k[b]),
            1.0 if top_p is None else float(top_p[b]),
            0.0 if min_p is None else float(min_p[b]),
        )

    def target(self, logits: Tensor) -> Tensor | None:
        return target_law(logits, self.temperature, self.top_k, self.top_p, self.min_p)


def draw(residual: Tensor, p: Tensor, noise: Noise) -> int:
    """The race over what is left; no mass left is rounding alone, then p is drawn from."""
    return noise.race(residual if float(residual.sum()) > 0 else p)


def visit(
    logits: Tensor, children: Sequence[int], q: SparseLaw | None, settings: Settings, noise: Noise
) -> tuple[int, int | None]:
    """The token that follows a node, and its place among the children (None: not one of them).

    The token is -1 where the row is bad: NaN, +inf, or no finite logit.
    """
    if settings.temperature == 0:
        top = logits.max()
        token = int((logits == top).nonzero()[0]) if bool(top.isfinite()) else -1
        return token, children.index(token) if token in children else None
    p = settings.target(logits)
    if p is None:
        return -1, None
    if settings.law == Law.COUPLED:
        token = noise.race(p)
        return token, children.index(token) if token in children else None
    if settings.law == Law.DETERMINISTIC or q is None:
        distinct = list(dict.fromkeys(t for t in children if t >= 0))
        q, law = SparseLaw(distinct, [1.0] * len(distinct)), Law.DETERMINISTIC
    else:
        law = Law.SAMPLED
    residual, ids = p.clone(), list(q.ids)
    residual[ids] = 0.0
    walk = NodeWalk(p[ids].tolist(), list(q.w), float(residual.sum()), law)
    accepted = offer(walk, q.ids, children, noise.accept)
    if accepted is not None:
        return children[accepted], accepted
    residual[ids] = torch.tensor(walk.r, dtype=p.dtype, device=p.device)
    return draw(residual, p, noise), None
