"""How far each sequence's outcome is from another: the closest call of the reference, float64.

Kernels sum and take logarithms in float32, so ids are compared where every call was clear.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from eesd_kernels.reference.acceptance import NodeWalk
from eesd_kernels.reference.block import BlockWalk
from eesd_kernels.reference.philox import race_exponential
from eesd_kernels.reference.verify_node import Noise

CLEAR = 1e-5  # between the natural logarithms of the two sides


class _Closest:
    """The smallest margin since `take` was last asked."""

    def __init__(self) -> None:
        self.margin = float("inf")

    def note(self, a: float, b: float) -> None:
        """A call that asked which of two numbers is larger."""
        if a > 0 and b > 0:
            gap = abs(float(torch.tensor(a / b, dtype=torch.float64).log()))
            self.margin = min(self.margin, gap)

    def take(self) -> float:
        margin, self.margin = self.margin, float("inf")
        return margin


@contextmanager
def _watched() -> Iterator[_Closest]:
    closest = _Closest()
    accepts, race, accepted = NodeWalk.accepts, Noise.race, BlockWalk.accepted

    def watch_accepts(walk: NodeWalk, child: int, u: float) -> bool:
        s = sum(walk.r) + walk.outside
        w, total = (1.0, 1.0) if walk.law == 1 else (walk.w[child], sum(walk.w))
        closest.note(u * w * s, walk.r[child] * total)
        return accepts(walk, child, u)

    def watch_race(noise: Noise, weights: Tensor) -> int:
        words = noise.words(noise.seed, noise.position, noise.base, 2, weights.numel())[0]
        scores = weights.log() - race_exponential(words).log()
        if scores.numel() > 1:
            best = scores.topk(2).values
            gap = float(best[0] - best[1])
            closest.margin = min(closest.margin, gap) if gap == gap else closest.margin
        return race(noise, weights)

    def watch_accepted(walk: BlockWalk, uniform: Callable[[int], Any]) -> int:
        last = len(walk.mass)
        for i in range(last, 0, -1):
            a, s, u = walk.stands[i], walk.mass[i] if i < last else 0.0, uniform(i)
            closest.note(u if i == last else u * (s + 1 - a), a if i == last else s)
        return accepted(walk, uniform)

    with (
        patch.object(NodeWalk, "accepts", watch_accepts),
        patch.object(Noise, "race", watch_race),
        patch.object(BlockWalk, "accepted", watch_accepted),
    ):
        yield closest


def with_margins(
    reference: Callable[..., tuple[Tensor, ...]], arguments: dict[str, Any], **changes: Any
) -> tuple[list[Tensor], Tensor]:
    """The reference's results and each sequence's margin, float64 `[B]`."""
    batch = len(arguments["law"])
    rows, margins = [], []
    with _watched() as closest:
        for b in range(batch):
            one = {k: v if v is None else v[b : b + 1] for k, v in arguments.items()}
            rows.append(reference(**one, **changes))
            margins.append(closest.take())
    if not rows:
        return list(reference(**arguments, **changes)), torch.empty(0, dtype=torch.float64)
    return [torch.cat(parts) for parts in zip(*rows, strict=True)], torch.tensor(
        margins, dtype=torch.float64
    )
