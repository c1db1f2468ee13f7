"""Verification at one node, exactly: children against the target's law, one after the other.

Written over plain numbers, so that the same lines run in float64 inside the reference and on
rationals in the enumeration that proves them. With w the weights of the children's law on its k
ids, r the target's mass left on those ids, o its mass outside them, `s = sum r + o`,
`W = sum w` and u uniform in [0, 1), a child t is accepted

- sampled without replacement: iff `u w(t) s < r(t) W`; else `r(x) = max(r(x) - s w(x) / W, 0)`
  on the k ids, then `r(t) = w(t) = 0`;
- deterministic: iff `u s < r(t)`; else `r(t) = 0`.

Where no child is accepted the token is drawn from r and o as they then stand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eesd_kernels.laws import Law

Number = Any  # float or fractions.Fraction


@dataclass
class NodeWalk:
    """r, w `[k]` and o; `law` says which rule the children are under."""

    r: list[Number]
    w: list[Number]
    outside: Number
    law: Law

    def accepts(self, child: int, u: Number) -> bool:
        """Whether the child at index `child` of the k ids is accepted."""
        s = sum(self.r) + self.outside
        if self.law == Law.DETERMINISTIC:
            return bool(u * s < self.r[child])
        return bool(u * self.w[child] * s < self.r[child] * sum(self.w))

    def reject(self, child: int) -> None:
        """Take the rejected child's draw out of the target's law."""
        if self.law != Law.DETERMINISTIC:
            s, total = sum(self.r) + self.outside, sum(self.w)
            self.r = [max(a - s * b / total, 0 * a) for a, b in zip(self.r, self.w, strict=True)]
            self.w[child] = 0 * self.w[child]
        self.r[child] = 0 * self.r[child]


def offer(
    walk: NodeWalk,
    ids: Sequence[int],
    children: Sequence[int],
    uniform: Callable[[int], Number],
) -> int | None:
    """Offer the children in the order drawn: the accepted one's place among them, or None.

    `ids` are the k ids of the walk; `uniform(sibling)` tests the child at that place. A child that
    the law cannot have drawn then is passed over and takes nothing from r: one outside the ids, a
    second copy of a token, or any child of a law without weight left.
    """
    offered: set[int] = set()
    for sibling, token in enumerate(children):
        if token in offered or token not in ids or sum(walk.w) == 0:
            continue
        offered.add(token)
        child = ids.index(token)
        if walk.accepts(child, uniform(sibling)):
            return sibling
        walk.reject(child)
    return None
