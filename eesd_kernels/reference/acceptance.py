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
